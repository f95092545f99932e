"""One process that makes calls: `python -m loadtest.generator`, told what to do by lines of JSON.

It answers the first line, an `Order`, with "ready" when its share of the memories is stored. The second says when to
begin; a third, or the end of its input, ends it early. What became of the calls is the last line it prints.

With a rate it is an open loop: calls begin at their time whatever became of those before, and what a call took is
counted from that time, also where it had to wait for a free caller. A service that stalls does not slow down who
measures it (G. Tene, "How NOT to Measure Latency", 2015).
"""

import asyncio
import json
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvloop

from loadtest import profile as profiles
from loadtest.calls import Calls, ClientKind, connect, said
from loadtest.profile import Operation, Profile
from loadtest.subjects import Key, Subjects
from loadtest.tally import Tally
from memshard import DeadlineExceeded, ResourceExhausted, Unavailable
from memshard.errors import MemshardError

# Calls of one process under way: what a machine full of agents might have, and no more than memory bears.
_MOST_UNDER_WAY = 20_000
# How long after its deadline a call may take to hear that it has passed.
_GRACE_S = 1.0
# Storing what is to be there: bytes of embeddings in one batch, batches at once, and how often one is tried.
_BATCH_BYTES = 2**21
_MOST_IN_BATCH = 250
_BATCHES_AT_ONCE = 2
_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Order:
    """What a process is to do."""

    profile: Profile
    address: str
    client: ClientKind
    process: int
    """Its number, from 0."""
    prepare: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile.model_dump(mode="json"),
            "address": self.address,
            "client": self.client,
            "process": self.process,
            "prepare": self.prepare,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Order":
        """What `to_json` gave."""
        return cls(**{**document, "profile": profiles.parse(document["profile"], "profile")})


def share_of(whole: int, process: int, processes: int) -> int:
    """How many of `whole` fall to one process, as evenly as can be."""
    return whole // processes + (process < whole % processes)


def due_times(rate: float, arrivals: str, source: random.Random) -> Iterator[float]:
    """Seconds from the beginning at which calls are due, without end."""
    at = 0.0
    while True:
        at += source.expovariate(rate) if arrivals == "poisson" else 1 / rate
        yield at


async def prepare(calls: Calls, order: Order) -> None:
    """Stores this process's share of the memories that are to be there. Raises MemshardError."""
    data = order.profile.data
    size = max(1, min(_MOST_IN_BATCH, _BATCH_BYTES // max(data.content_bytes + 4 * (data.dimensions or 0), 1)))
    keys = (
        Key(user, number)
        for user in range(order.process, data.users, order.profile.processes)
        for number in range(data.memories)
    )
    batches = _batched(keys, size)

    async def store() -> None:
        for batch in batches:
            memories = [calls.subjects.original(key) for key in batch]
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    await calls.prepare(memories)
                    break
                except (Unavailable, ResourceExhausted, DeadlineExceeded) as error:
                    if attempt == _ATTEMPTS:
                        raise
                    await asyncio.sleep(min(error.retry_after_s or 0.5, 5.0))

    async with asyncio.TaskGroup() as group:
        for _ in range(_BATCHES_AT_ONCE):
            group.create_task(store())


class Run:
    """The calls of one process. `stop` ends it early."""

    def __init__(self, calls: Calls, order: Order) -> None:
        self.tally = Tally()
        self._calls = calls
        self._profile = order.profile
        self._process = order.process
        self._random = random.Random(f"{order.profile.seed} {order.process}")  # noqa: S311  # Of load, not of secrets.
        operations, weights = zip(*order.profile.operations.items(), strict=True)
        self._operations: tuple[Operation, ...] = operations
        self._weights: tuple[float, ...] = weights
        self._stopped = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._measured_from = 0.0
        self._last_end = 0.0

    def stop(self) -> None:
        """No call is begun after this."""
        self._stopped.set()

    async def run(self, begin: float) -> Tally:
        """Begins at a moment of the event loop's clock, and returns when the last call has its answer."""
        loop = asyncio.get_running_loop()
        self._measured_from = begin + self._profile.warm_up_s
        end = self._measured_from + self._profile.duration_s
        await self._until(begin)
        making = self._open(begin, end) if self._profile.rate else self._closed(end)
        await making
        if self._under_way:
            _, left = await asyncio.wait(self._under_way, timeout=self._profile.timeout_s + _GRACE_S)
            self.tally.cut_off = len(left)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        stopped = min(loop.time(), end)
        self.tally.seconds = max(0.0, max(self._last_end, stopped) - self._measured_from)
        return self.tally

    async def _closed(self, end: float) -> None:
        """Callers who make one call after the other."""
        loop = asyncio.get_running_loop()
        callers = share_of(self._profile.concurrency or 1, self._process, self._profile.processes)

        async def caller() -> None:
            while not self._stopped.is_set() and (now := loop.time()) < end:
                await self._call(self._choose(), now)

        self._under_way = {asyncio.create_task(caller()) for _ in range(callers)}
        await asyncio.wait([*self._under_way, waiting := asyncio.create_task(self._until(end))])
        waiting.cancel()

    async def _open(self, begin: float, end: float) -> None:
        """Calls at their time; with a concurrency, each by a caller who is free."""
        loop = asyncio.get_running_loop()
        profile = self._profile
        callers = _MOST_UNDER_WAY
        if profile.concurrency is not None:
            callers = share_of(profile.concurrency, self._process, profile.processes)
        free = asyncio.Semaphore(callers)

        async def call(operation: Operation, due: float) -> None:
            async with free:
                await self._call(operation, due)

        rate = (profile.rate or 1.0) / profile.processes
        for after in due_times(rate, profile.arrivals, self._random):
            due = begin + after
            if due >= end or self._stopped.is_set():
                return
            await self._until(due)
            operation = self._choose()
            if due >= self._measured_from:
                self.tally.late_s = max(self.tally.late_s, loop.time() - due)
            if len(self._under_way) >= _MOST_UNDER_WAY:
                self._failed(operation, due, "RESOURCE_EXHAUSTED", "NOT_SENT")
                continue
            task = asyncio.create_task(call(operation, due))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _call(self, operation: Operation, due: float) -> None:
        loop = asyncio.get_running_loop()
        make: Callable[[], Awaitable[object]] = self._calls.by_operation[operation]
        try:
            answer = await make()
        except MemshardError as error:
            self._failed(operation, due, error.code.name, error.reason)
            if self._profile.rate is None:
                # Whoever is refused at once must not spin.
                await asyncio.sleep(0.01)
        else:
            if due >= self._measured_from:
                self.tally.of(operation).succeeded(loop.time() - due, said(answer))
        if due >= self._measured_from:
            self._last_end = loop.time()

    def _failed(self, operation: Operation, due: float, code: str, reason: str) -> None:
        if due >= self._measured_from:
            self.tally.of(operation).failed(code, reason)

    def _choose(self) -> Operation:
        (operation,) = self._random.choices(self._operations, self._weights)
        return operation

    async def _until(self, moment: float) -> None:
        """Sleeps until a moment, or until it is stopped."""
        wait_s = moment - asyncio.get_running_loop().time()
        if wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._stopped.wait()
            except TimeoutError:
                return


def _batched(keys: Iterator[Key], size: int) -> Iterator[tuple[Key, ...]]:
    batch: list[Key] = []
    for key in keys:
        batch.append(key)
        if len(batch) == size:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)


async def _main() -> None:
    commands = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    order = Order.from_json(json.loads(await commands.readline()))
    calls = connect(order.client, order.address, order.profile, Subjects(order.profile, order.process))
    try:
        if order.prepare and (failed := await _prepared(calls, order)):
            _say({"failed": failed})
            return
        _say({"ready": True})
        line = await commands.readline()
        if not line:
            return
        run = Run(calls, order)

        async def end() -> None:
            await commands.readline()
            run.stop()

        ending = asyncio.create_task(end())
        # All processes of a machine have one monotonic clock, which is the event loop's too.
        tally = await run.run(float(json.loads(line)["begin"]))
        ending.cancel()
        _say(tally.to_json())
    finally:
        await calls.close()


async def _prepared(calls: Calls, order: Order) -> str:
    """Why what is to be there is not; empty when it is."""
    failed = ""
    try:
        await prepare(calls, order)
    except* MemshardError as group:
        failed = str(group.exceptions[0])
    return failed


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
