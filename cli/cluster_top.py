"""`memshard top`: what the routers see at this moment, again and again, until q or Ctrl-C."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
import json as as_json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cluster_health import Admin, AsJson, TokenFile, chosen_routers
from cli.cluster_options import DataDir, failures_shown

if TYPE_CHECKING:
    from cli.cluster_top_view import Document
    from local.router_admin import RouterAdmin

_HOT_USERS = 20
_QUIT = b"qQ\x1b\x04"


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once and end; so it is when nobody watches.")] = False,
    json: AsJson = False,
    names: Annotated[bool, typer.Option("--names", help="Hot users by their ids, not by hashes of them.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.2, max=60, help="Between two looks.")
    ] = 1.0,
    data_dir: DataDir = None,
    admin: Admin = None,
    token_file: TokenFile = None,
) -> None:
    """Watch shards, replicas, latencies, breakers and hot users. q or Ctrl-C ends it.

    With --once or --json it prints one look; exit code 1 when a router does not answer.
    """
    from cli.cluster_top_view import show

    with failures_shown():
        routers = chosen_routers(data_dir, admin, token_file)
        if json or once or not sys.stdout.isatty():
            document = asyncio.run(_look(routers, names=names))
            if json:
                typer.echo(as_json.dumps(document, indent=2))
            else:
                show(document)
            if any("error" in router for router in document["routers"]):
                raise typer.Exit(1)
        else:
            asyncio.run(_watch(routers, interval, names=names))


async def _look(routers: "list[RouterAdmin]", *, names: bool) -> "Document":
    """What all routers say."""
    from cli.cluster_top_view import document_of
    from local.router_admin import of_each

    stats, hot = await asyncio.gather(
        of_each(routers, lambda router: router.stats()),
        of_each(routers, lambda router: router.hot_users(_HOT_USERS, names=names)),
    )
    return document_of(stats, hot, time.time())


async def _watch(routers: "list[RouterAdmin]", interval_s: float, *, names: bool) -> None:
    from rich.live import Live

    from cli.cluster_top_view import rendered
    from cli.terminal import console

    stopped = asyncio.Event()
    out = console()
    with _quits(stopped.set), Live(console=out, screen=True, auto_refresh=False) as live:
        while not stopped.is_set():
            looking = asyncio.create_task(_look(routers, names=names))
            stopping = asyncio.create_task(stopped.wait())
            # A router that hangs must not keep whoever wants to leave.
            await asyncio.wait({looking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                live.update(rendered(looking.result(), out.height), refresh=True)
                await asyncio.wait({stopping}, timeout=interval_s)
            for task in (looking, stopping):
                task.cancel()
            await asyncio.gather(looking, stopping, return_exceptions=True)


@contextmanager
def _quits(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on q, Ctrl-C and the like; the terminal is as it was afterwards."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        if sys.stdin.isatty():
            with _keys(stop):
                yield
        else:
            yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _keys(stop: Callable[[], None]) -> Iterator[None]:
    import termios
    import tty

    loop, keyboard = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def read() -> None:
        typed = os.read(keyboard, 64)
        # Nothing at all is the end: the terminal has gone.
        if not typed or any(key in _QUIT for key in typed):
            stop()

    # Single keys at once, and Ctrl-C still a signal.
    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
