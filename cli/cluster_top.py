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
    from cli.cluster_top_view import Answer, Document, HotAnswer
    from local.router_admin import RouterAdmin

_HOT_USERS = 20
# Seconds for an answer. What is looked up is in the router's memory, so one that takes longer is not well.
_TIMEOUT_S = 2.0
# Seconds in which answers of several routers become one screen.
_TOGETHER_S = 0.1
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

    told = await asyncio.gather(*(_ask(router, names=names) for router in routers))
    return document_of([stats for stats, _ in told], [hot for _, hot in told], time.time())


async def _ask(router: "RouterAdmin", *, names: bool) -> "tuple[Answer, HotAnswer]":
    """What one router says, or why it does not."""
    from local.router_admin import of_each

    stats, hot = await asyncio.gather(
        of_each([router], lambda one: one.stats(timeout_s=_TIMEOUT_S)),
        of_each([router], lambda one: one.hot_users(_HOT_USERS, names=names, timeout_s=_TIMEOUT_S)),
    )
    return stats[0], hot[0]


async def _watch(routers: "list[RouterAdmin]", interval_s: float, *, names: bool) -> None:
    """Asks each router by itself: one that hangs keeps neither the others' rows nor whoever wants to leave."""
    from rich.live import Live

    from cli.cluster_top_view import document_of, rendered
    from cli.terminal import console
    from local.errors import LocalClusterError

    stats: list[Answer] = [(router, LocalClusterError("has not answered yet")) for router in routers]
    hot: list[HotAnswer] = [(router, LocalClusterError("has not answered yet")) for router in routers]
    changed, stopped = asyncio.Event(), asyncio.Event()
    out = console()

    async def listen(number: int) -> None:
        while True:
            stats[number], hot[number] = await _ask(routers[number], names=names)
            changed.set()
            await asyncio.sleep(interval_s)

    async def draw() -> None:
        while True:
            await changed.wait()
            await asyncio.sleep(_TOGETHER_S)
            changed.clear()
            live.update(rendered(document_of(stats, hot, time.time()), out.height), refresh=True)

    with _quits(stopped.set), Live(console=out, screen=True, auto_refresh=False) as live:
        tasks = [asyncio.create_task(part) for part in (stopped.wait(), draw(), *map(listen, range(len(routers))))]
        # Only the first of them has an end, but for bugs.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


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
