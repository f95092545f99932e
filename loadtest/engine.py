"""A load test: several processes that begin at one moment, and what became of all their calls."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal

from loadtest.calls import ClientKind
from loadtest.generator import Order
from loadtest.profile import Profile
from loadtest.tally import Tally, merged

# Between the word to begin and the beginning, so that it reaches all processes before.
_AHEAD_S = 0.2
# The line with what became of the calls: a histogram has at most some twenty thousand buckets for each operation.
_LONGEST_LINE = 2**26


class LoadError(Exception):
    """The load test could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a load test came to."""

    profile: Profile
    client: ClientKind
    address: str
    tally: Tally
    end: Literal["normal", "cancel"]
    """Whether it ran its time, or somebody stopped it."""
    began: float
    """Unix time of the first call that was measured."""


async def run(
    profile: Profile,
    address: str,
    client: ClientKind,
    *,
    prepare: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Makes the calls of a profile. SIGINT ends it early, and what was measured until then is the outcome.

    Raises LoadError: what is to be there cannot be stored, or a process died.
    """
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(_Generator()) for _ in range(profile.processes)]
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stopped.set)
        stack.callback(loop.remove_signal_handler, signal.SIGINT)
        if prepare:
            tell(f"storing {profile.data.users * profile.data.memories:,} memories of {profile.data.users:,} users")
        orders = [Order(profile, address, client, number, prepare) for number in range(profile.processes)]
        ready = asyncio.gather(*(p.ask(order.to_json()) for p, order in zip(processes, orders, strict=True)))
        if not await _finished(ready, stopped):
            return Outcome(profile, client, address, Tally(), "cancel", time.time())
        tell(f"{profile.warm_up_s:g} s to warm up, then {profile.duration_s:g} s that count; Ctrl-C ends it early")
        begin = time.monotonic() + _AHEAD_S
        began = time.time() + _AHEAD_S + profile.warm_up_s
        done = asyncio.gather(*(process.ask({"begin": begin}) for process in processes))
        end: Literal["normal", "cancel"] = "normal"
        if not await _finished(done, stopped):
            end = "cancel"
            for process in processes:
                process.stop()
        tallies = [Tally.from_json(document) for document in await done]
        return Outcome(profile, client, address, merged(tallies), end, began)


async def _finished(work: "asyncio.Future[list[dict[str, Any]]]", stopped: asyncio.Event) -> bool:
    """Whether it was done before somebody stopped it. Raises what it does."""
    stopping = asyncio.create_task(stopped.wait())
    try:
        waiting: set[asyncio.Future[Any]] = {work, stopping}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if work.done():
        work.result()
        return True
    return False


class _Generator:
    """A process that makes calls; it ends with the `async with`."""

    async def __aenter__(self) -> "_Generator":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadtest.generator",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            # A Ctrl-C of the terminal is for whoever reports; it tells this one.
            start_new_session=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def ask(self, document: dict[str, Any]) -> dict[str, Any]:
        """The answer to a line. Raises LoadError."""
        assert self._process.stdout is not None
        self._write(document)
        line = await self._process.stdout.readline()
        if not line:
            raise LoadError("a process that makes calls has ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise LoadError(f"what is to be there cannot be stored: {answer['failed']}")
        return answer

    def stop(self) -> None:
        """No call is begun after this."""
        self._write({"stop": True})

    def _write(self, document: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(document).encode() + b"\n")
