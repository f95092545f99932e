"""Load from a process of its own, so that what it measures does not wait for a test's event loop.

`python -m tests.support.generator`, told a `Plan` as one line of JSON on its standard input, prints "ready" when each
user has something to read, begins at the next line, and writes what became of each call to `plan.file` at the third,
or when `plan.seconds` are over.

With a rate it is an open loop: calls begin at their time whatever became of those before, and what a call took is
counted from that time, so that a service that stalls does not slow down who measures it (G. Tene, "How NOT to Measure
Latency", 2015). Without one, each of `callers` makes one call after the other.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import uvloop

from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from tests.support.wire import reason_of

_SERVICE = "/memshard.v1.MemoryService/"
# Calls of one generator under way: what a machine full of agents might have, and no more than memory bears.
_MOST_UNDER_WAY = 20_000
_BATCH = 20
_PRELOAD_TIMEOUT_S = 30.0
_PRELOAD_BATCH = 250
OK = "OK"
_NOT_SENT = "NOT_SENT"


@dataclass(frozen=True)
class Plan:
    """What a generator does."""

    address: str
    users: dict[str, list[str]]
    """Users by group; calls are shared out evenly among the groups."""
    mix: dict[str, float] = field(default_factory=lambda: {"store": 3, "get": 4, "list": 1, "search": 2})
    """Kinds of calls and their weights: store, batch, get, locate (get without the user), list, search."""
    rate: float = 0.0
    """Calls a second, at random times (Poisson)."""
    callers: int = 0
    """Who make one call after the other, when there is no rate."""
    seconds: float = 0.0
    """How long; 0: until told to stop."""
    timeout_s: float = 5.0
    """Deadline of each call."""
    dimensions: int = 16
    memories: int = 5
    """Stored for each user at first, to be found."""
    eventual: bool = False
    """Whether reads are EVENTUAL, so that replicas serve them, rather than STRONG."""
    channels: int = 2
    file: str = ""
    seed: int = 0


_FIELDS = [
    ("at", "f8"),
    ("late_s", "f4"),
    ("took_s", "f4"),
    ("group", "i2"),
    ("kind", "i2"),
    ("outcome", "i2"),
]


@dataclass(frozen=True)
class Calls:
    """What became of calls: an array with a row for each, and the names of what its numbers stand for.

    `at` is when a call was due, by the monotonic clock, which all processes of a machine share; `late_s` how much later
    it was sent; `took_s` how long after it was due its answer was there.
    """

    rows: npt.NDArray[Any]
    groups: list[str]
    kinds: list[str]
    outcomes: list[str]

    def where(
        self,
        *,
        since: float = 0.0,
        until: float = float("inf"),
        group: str | None = None,
        but_group: str | None = None,
        outcome: str | tuple[str, ...] | None = None,
        kinds: tuple[str, ...] = (),
    ) -> "Calls":
        """Those that were due in a time, of a group, with an outcome that begins so (`failed`: any but OK)."""
        rows = self.rows
        keep = (rows["at"] >= since) & (rows["at"] < until)
        if group is not None:
            keep &= rows["group"] == self.groups.index(group)
        if but_group is not None:
            keep &= rows["group"] != self.groups.index(but_group)
        if outcome is not None:
            failed = outcome == "failed"
            numbers = [
                n for n, name in enumerate(self.outcomes) if (name != OK if failed else name.startswith(outcome))
            ]
            keep &= np.isin(rows["outcome"], numbers)
        if kinds:
            keep &= np.isin(rows["kind"], [self.kinds.index(kind) for kind in kinds])
        return Calls(rows[keep], self.groups, self.kinds, self.outcomes)

    def __len__(self) -> int:
        return len(self.rows)

    def percentile_ms(self, percent: float) -> float:
        """How long calls took; NaN when there are none."""
        return float(np.percentile(self.rows["took_s"], percent)) * 1000 if len(self.rows) else float("nan")

    def longest_s(self) -> float:
        """The longest that one took."""
        return float(self.rows["took_s"].max()) if len(self.rows) else 0.0

    def counts(self) -> Counter[str]:
        """How many had which outcome."""
        numbers, counts = np.unique(self.rows["outcome"], return_counts=True)
        return Counter({self.outcomes[n]: int(count) for n, count in zip(numbers, counts, strict=True)})

    def ends(self) -> npt.NDArray[np.float64]:
        """When the answer of each was there."""
        ends: npt.NDArray[np.float64] = self.rows["at"] + self.rows["took_s"]
        return ends

    def join(self, other: "Calls") -> "Calls":
        """These and another generator's with the same groups."""
        assert (self.groups, self.kinds) == (other.groups, other.kinds)
        outcomes = [*self.outcomes, *(name for name in other.outcomes if name not in self.outcomes)]
        rows = other.rows.copy()
        rows["outcome"] = np.array([outcomes.index(name) for name in other.outcomes] or [0])[other.rows["outcome"]]
        return Calls(np.concatenate([self.rows, rows]), self.groups, self.kinds, outcomes)


class Generator:
    """A generator that is ready; `go` begins, `stop` ends it and reads what it has seen."""

    def __init__(self, process: asyncio.subprocess.Process, plan: Plan) -> None:
        self.plan = plan
        self._process = process

    async def go(self) -> None:
        """Begins."""
        await self._tell()

    async def stop(self) -> Calls:
        """Ends it after the calls under way."""
        with suppress(ConnectionError):
            await self._tell()
        return await self.done()

    async def done(self) -> Calls:
        """What became of its calls, once its time is over."""
        assert await self._process.wait() == 0
        with np.load(self.plan.file) as file:
            names = json.loads(str(file["names"]))
            return Calls(file["rows"], **names)

    async def _tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def generating(plan: Plan) -> AsyncIterator[Generator]:
    """A generator in a process of its own, ready. Killed at the end if it still runs. `plan.file` has to be given."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.generator",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        assert await process.stdout.readline() == b"ready\n"
        yield Generator(process, plan)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@dataclass(frozen=True)
class _Prepared:
    """A call that can be made again and again without work: what is measured is the service."""

    group: int
    kind: int
    raw: bytes


class _Run:
    """The generator's side, in its own process."""

    def __init__(self, plan: Plan, channels: list[grpc.aio.Channel]) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._channels = channels
        self._kinds = list(plan.mix)
        self._groups = list(plan.users)
        self._ids: dict[str, list[str]] = {}
        self._outcomes: dict[str, int] = {OK: 0, _NOT_SENT: 1}
        self._rows: list[tuple[float, float, float, int, int, int]] = []
        self._methods: list[Mapping[str, Any]] = [
            {kind: channel.unary_unary(_SERVICE + _METHODS[kind]) for kind in {*self._kinds, "batch"}}
            for channel in channels
        ]
        self._under_way: set[asyncio.Task[None]] = set()
        self._reads = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL if plan.eventual else pb.READ_LEVEL_STRONG)
        self._embeddings = [[self._random.gauss(0, 1) for _ in range(plan.dimensions)] for _ in range(64)]
        self._raw_stores = [
            pb.StoreMemoryRequest(memory=pb.Memory(embedding=embedding)).SerializeToString()
            for embedding in self._embeddings
        ]
        self._raw_searches = [
            pb.SearchMemoriesRequest(embedding=embedding).SerializeToString() for embedding in self._embeddings
        ]

    async def preload(self) -> None:
        """Something to read for each user."""
        for users in self._plan.users.values():
            for user in users:
                ids = self._ids[user] = [new_id() for _ in range(self._plan.memories)]
                for start in range(0, len(ids), _PRELOAD_BATCH):
                    batch = pb.BatchStoreMemoriesRequest(
                        memories=[self._memory(user, memory_id) for memory_id in ids[start : start + _PRELOAD_BATCH]]
                    )
                    raw = await self._methods[0]["batch"](batch.SerializeToString(), timeout=_PRELOAD_TIMEOUT_S)
                    results = pb.BatchStoreMemoriesResponse.FromString(raw).results
                    assert all(result.id for result in results), results[0]

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, and until the calls under way have ended."""
        if self._plan.rate:
            await self._open_loop(stop)
        else:
            await asyncio.gather(*(self._closed_loop(stop) for _ in range(self._plan.callers)))
        if self._under_way:
            await asyncio.wait(self._under_way)

    def save(self) -> None:
        names = {"groups": self._groups, "kinds": self._kinds, "outcomes": list(self._outcomes)}
        np.savez(self._plan.file, rows=np.array(self._rows, dtype=_FIELDS), names=json.dumps(names))

    async def _open_loop(self, stop: asyncio.Event) -> None:
        due = time.monotonic()
        while not stop.is_set():
            due += self._random.expovariate(self._plan.rate)
            if (early_s := due - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(early_s):
                        await stop.wait()
            if stop.is_set():
                return
            if len(self._under_way) >= _MOST_UNDER_WAY:
                prepared = self._prepare()
                self._rows.append((due, 0.0, 0.0, prepared.group, prepared.kind, self._outcomes[_NOT_SENT]))
                continue
            task = asyncio.create_task(self._call(due))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _closed_loop(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._call(time.monotonic())

    async def _call(self, due: float) -> None:
        prepared = self._prepare()
        method = self._random.choice(self._methods)[self._kinds[prepared.kind]]
        late_s = time.monotonic() - due
        outcome = OK
        try:
            await method(prepared.raw, timeout=self._plan.timeout_s)
        except grpc.aio.AioRpcError as error:
            outcome = f"{error.code().name} {reason_of(error)}".strip()
        took_s = time.monotonic() - due
        number = self._outcomes.setdefault(outcome, len(self._outcomes))
        self._rows.append((due, late_s, took_s, prepared.group, prepared.kind, number))

    def _prepare(self) -> _Prepared:
        group = self._random.randrange(len(self._groups))
        user = self._random.choice(self._plan.users[self._groups[group]])
        (kind,) = self._random.choices(self._kinds, list(self._plan.mix.values()))
        return _Prepared(group, self._kinds.index(kind), self._request(kind, user))

    def _request(self, kind: str, user: str) -> bytes:
        match kind:
            case "store":
                memory_id = new_id()
                memory = pb.Memory(id=memory_id, user_id=user, content=f"something about {memory_id}")
                # Two serialised messages, one after the other, are both merged: the numbers are there already.
                request: Any = pb.StoreMemoryRequest(memory=memory)
                return self._random.choice(self._raw_stores) + bytes(request.SerializeToString())
            case "batch":
                request = pb.BatchStoreMemoriesRequest(memories=[self._memory(user, new_id()) for _ in range(_BATCH)])
            case "get":
                request = pb.GetMemoryRequest(id=self._random.choice(self._ids[user]), user_id=user, read=self._reads)
            case "locate":
                request = pb.GetMemoryRequest(id=self._random.choice(self._ids[user]), read=self._reads)
            case "list":
                request = pb.ListMemoriesRequest(user_id=user, page_size=5, read=self._reads)
            case "search":
                request = pb.SearchMemoriesRequest(user_id=user, limit=5, read=self._reads)
                return self._random.choice(self._raw_searches) + bytes(request.SerializeToString())
            case unknown:
                raise ValueError(unknown)
        raw: bytes = request.SerializeToString()
        return raw

    def _memory(self, user: str, memory_id: str) -> pb.Memory:
        embedding = self._random.choice(self._embeddings)
        return pb.Memory(id=memory_id, user_id=user, content=f"something about {memory_id}", embedding=embedding)


_METHODS = {
    "store": "StoreMemory",
    "batch": "BatchStoreMemories",
    "get": "GetMemory",
    "locate": "GetMemory",
    "list": "ListMemories",
    "search": "SearchMemories",
}


async def _main() -> None:
    commands = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    plan = Plan(**json.loads(await commands.readline()))
    async with AsyncExitStack() as stack:
        channels = []
        for number in range(plan.channels):
            # Options that differ keep channels from sharing one connection.
            channel = grpc.aio.insecure_channel(plan.address, options=[("memshard.number", number)])
            channels.append(await stack.enter_async_context(channel))
        run = _Run(plan, channels)
        await run.preload()
        print("ready", flush=True)
        await commands.readline()
        stop = asyncio.Event()

        async def ended() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(plan.seconds or None):
                    await commands.readline()
            stop.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(ended())
            group.create_task(run.run(stop))
        run.save()


def result_file(directory: Path, name: str) -> str:
    """Where a generator of a test may leave what it has seen."""
    return str(directory / f"{name}.npz")


if __name__ == "__main__":
    uvloop.run(_main())
