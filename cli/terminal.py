"""What reaches the terminal: text that cannot command it, and failures in one line."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import typer
from rich.console import Console

from memshard import DeadlineExceeded, MemshardError, Unavailable

_MIN_WIDTH: Final = 64
"""An id of 36 characters beside a time or a score, so that no id is ever broken."""

_JOINERS: Final = "\u200c\u200d"
"""Invisible, but what many scripts and emoji are spelled with."""


def must_escape(char: str) -> bool:
    """Whether a character could command a terminal or deceive its reader: controls, bidi overrides, hidden tags."""
    category = unicodedata.category(char)
    return category in {"Cc", "Cs", "Zl", "Zp"} or (category == "Cf" and char not in _JOINERS)


class _Printable(dict[int, str]):
    """A table for str.translate that is made as characters are met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        shown = char.encode("unicode_escape").decode("ascii") if must_escape(char) else char
        self[code] = shown
        return shown


_LINES: Final = _Printable({ord("\n"): "\n", ord("\t"): "    "})
_ONE_LINE: Final = _Printable({ord("\n"): " ", ord("\r"): " ", ord("\t"): " "})


def printable(text: str) -> str:
    """The text with its line breaks, and with every character that could do harm shown as its escape."""
    return text.replace("\r\n", "\n").translate(_LINES)


def printable_line(text: str) -> str:
    """The same in one line."""
    return text.replace("\r\n", "\n").translate(_ONE_LINE)


def console(*, stderr: bool = False) -> Console:
    """A console that takes text literally: no markup, no emoji codes, no colouring of what looks like code."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    made.width = max(made.width, _MIN_WIDTH)
    return made


def warn(message: str) -> None:
    """One line on standard error."""
    typer.echo(f"Warning: {printable_line(message)}", err=True)


def fail(message: str, *, code: int = 1) -> NoReturn:
    """One line on standard error, and the end of the command."""
    typer.echo(f"Error: {printable_line(message)}", err=True)
    raise typer.Exit(code)


@contextmanager
def failures_in_one_line(address: str) -> Iterator[None]:
    """Ends the command with one line and exit code 1 when a call to this address fails."""
    try:
        yield
    except MemshardError as error:
        fail(describe(error, address))


def describe(error: MemshardError, address: str) -> str:
    """What went wrong and, where that is known, what to do."""
    if not error.reason and isinstance(error, Unavailable):  # No server spoke: this is the connection's failure.
        cause = error.message.rpartition(": ")[2]
        return (
            f"no memshard answers at {address} ({cause}). "
            "Start a cluster with `memshard up`, or name another with --address."
        )
    if not error.reason and isinstance(error, DeadlineExceeded):
        return f"no answer from {address} in time [DEADLINE_EXCEEDED]. Is it busy? --timeout waits longer."
    return f"{error} [{error.reason or error.code.name}]"
