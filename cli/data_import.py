"""The import command: progress, what went wrong where, and what is stored in the end."""

import asyncio
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from cli.documents import json_text
from cli.ingest import DELETED, MAX_BATCH, GaveUp, ingest
from cli.options import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Address, Json, Timeout, not_empty
from cli.records import BadRecord, Parsed
from cli.sources import count_records, read_records
from cli.terminal import console, describe, fail, failures_in_one_line, printable_line
from memshard import AlreadyExists, AsyncMemoryClient, InvalidArgument, MemshardError

_MAX_PROBLEMS: Final = 100
"""How many problems are told one by one: enough to find a pattern, few enough to read."""

_IN_BATCH: Final = re.compile(r"^memories\[\d+\]\.")


def register(app: typer.Typer) -> None:
    """Adds the command to app."""
    app.command("import")(import_)


def _readable(file: Path) -> Path:
    if str(file) != "-":
        try:
            file.open("rb").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None
    return file


def import_(
    file: Annotated[
        Path,
        typer.Argument(callback=_readable, help="- reads standard input."),
    ],
    user: Annotated[
        str | None, typer.Option("--user", "-u", callback=not_empty, help="Whose are the lines that name no user.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help=f"How many calls at once, of up to {MAX_BATCH} memories each.")
    ] = 4,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Store the memories of a file: JSON Lines, one memory a line, or LoCoMo's JSON.

    Run again, it stores nothing twice: a memory without an id gets one made from where it comes from.
    """
    total = _count(file) if sys.stderr.isatty() and not as_json else None
    tally = _Tally()
    gave_up: MemshardError | None = None
    with failures_in_one_line(address), _opened(file) as stream, _progress(total, as_json) as progress:
        tally.progress = progress
        records = read_records(stream, user)
        try:
            asyncio.run(_store(records, tally, concurrency, address, timeout))
        except GaveUp as stopped:
            gave_up = stopped.error
        except OSError as error:
            fail(f"{file}: {error.strerror or error}")
        except (KeyboardInterrupt, asyncio.CancelledError):  # asyncio.run says either, by what else was ending.
            progress.stop()
            typer.echo(f"Interrupted. {_stored(tally)} Run it again to go on.", err=True)
            raise typer.Exit(130) from None
    if gave_up is not None and not tally.seen:
        fail(describe(gave_up, address))
    if as_json:
        typer.echo(json_text(tally.document(complete=gave_up is None)))
    else:
        typer.echo(tally.summary())
    if gave_up is not None:
        fail(f"stopped: {describe(gave_up, address)} Run it again to go on.")
    if tally.stored < tally.seen:
        raise typer.Exit(1)


async def _store(records: Iterator[Parsed], tally: "_Tally", concurrency: int, address: str, timeout_s: float) -> None:
    async with AsyncMemoryClient(address, timeout_s=timeout_s) as client:
        await ingest(client, records, tally.report, concurrency=concurrency)


@dataclass(slots=True)
class _Tally:
    """What became of the records. An equal memory that was there before counts as stored: the service tells no more."""

    seen: int = 0
    stored: int = 0
    conflicts: int = 0
    deleted: int = 0
    invalid: int = 0
    failed: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    progress: Progress | None = None
    began: float = field(default_factory=time.monotonic)

    def report(self, record: Parsed, error: MemshardError | None) -> None:
        """Counts one record whose fate is known, and tells what is wrong with it."""
        self.seen += 1
        if isinstance(record, BadRecord):
            self.invalid += 1
            self._tell(record.source, record.field, "", record.message)
        elif error is None:
            self.stored += 1
        elif error.reason == DELETED:
            self.deleted += 1
            self._tell(record.source, "", "", f"{record.user_id}'s memory {record.id} {error.message}")
        elif isinstance(error, AlreadyExists):
            self.conflicts += 1
            message = f"{record.user_id} has a memory {record.id} with other content"
            self._tell(record.source, "id", error.reason, message)
        else:
            self.invalid += isinstance(error, InvalidArgument)
            self.failed += not isinstance(error, InvalidArgument)
            # The place in a call is nothing to who knows the place in the file.
            fields = ", ".join(_IN_BATCH.sub("", violation.field) for violation in error.field_violations)
            descriptions = "; ".join(violation.description for violation in error.field_violations)
            self._tell(record.source, fields, error.reason or error.code.name, descriptions or error.message)
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], advance=1)

    def summary(self) -> str:
        """The outcome in a sentence."""
        seconds = time.monotonic() - self.began
        parts = [
            f"{count:,} {what}"
            for count, what in (
                (self.conflicts, "in conflict with what is stored"),
                (self.deleted, "deleted within the last 24 hours"),
                (self.invalid, "not valid"),
                (self.failed, "failed"),
            )
            if count
        ]
        rest = f" Not stored: {', '.join(parts)}." if parts else ""
        return f"{_stored(self)}{rest} ({seconds:.1f} s)"

    def document(self, *, complete: bool) -> dict[str, Any]:
        """The outcome for programs; `complete` is false when the import stopped before the end."""
        return {
            "stored": self.stored,
            "conflicts": self.conflicts,
            "deleted": self.deleted,
            "invalid": self.invalid,
            "failed": self.failed,
            "complete": complete,
            "seconds": round(time.monotonic() - self.began, 3),
            "problems": self.problems,
            "problems_left_out": self.seen - self.stored - len(self.problems),
        }

    def _tell(self, source: str, field_name: str, reason: str, message: str) -> None:
        if len(self.problems) == _MAX_PROBLEMS:
            return
        self.problems.append({"source": source, "field": field_name, "reason": reason, "message": message})
        line = f"{source}: " + (f"{field_name}: " if field_name else "") + message + (f" [{reason}]" if reason else "")
        if len(self.problems) == _MAX_PROBLEMS:
            line += " (further problems are only counted)"
        # Through the bar's console, which draws the bar anew below the line.
        output = self.progress.console if self.progress is not None else console(stderr=True)
        output.print(Text(printable_line(line)), soft_wrap=True)


def _stored(tally: _Tally) -> str:
    return "1 memory is stored." if tally.stored == 1 else f"{tally.stored:,} memories are stored."


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if str(file) != "-":
        with file.open("rb") as stream:
            yield stream
        return
    try:
        number = sys.stdin.fileno()
    except io.UnsupportedOperation:
        yield sys.stdin.buffer  # Standard input of another program's making, such as a test's.
        return
    # A file of its own: a thread that still waits for standard input would otherwise hold the lock of sys.stdin when
    # the interpreter ends, which it answers with an abort. Not closed, for the same reason.
    yield os.fdopen(number, "rb", closefd=False)


def _count(file: Path) -> int | None:
    if str(file) == "-" or not file.is_file():
        return None
    with file.open("rb") as stream:
        return count_records(stream)


class _Rate(ProgressColumn):
    """Records a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


def _progress(total: int | None, as_json: bool) -> Progress:
    output = console(stderr=True)
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        console=output,
        disable=as_json or not output.is_terminal,
        transient=True,
    )
    progress.add_task("import", total=total)
    return progress
