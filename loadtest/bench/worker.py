"""One process of callers of one contender: `python -m loadtest.bench.worker`, told what to do by lines of JSON.

The first line is a `Start`, each that follows a `Task`; each is answered by a line.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import uvloop

from loadtest.bench.contender import Contender, Endpoint, Row
from loadtest.bench.workload import Vector, Workload, content, memory_id, new_id, unit_vector, user_name
from loadtest.histogram import Histogram

# Imported when they are needed: not everybody's packages can be installed together.
KINDS = {
    "straight": "loadtest.bench.straight:Straight",
    "same_table": "loadtest.bench.straight:SameTable",
    "routed": "loadtest.bench.clustered:Routed",
    "with_client": "loadtest.bench.clustered:WithClient",
    "shard_only": "loadtest.bench.clustered:ShardOnly",
    "echo": "loadtest.bench.echo:Echo",
    "chroma": "loadtest.bench.others:Chroma",
    "mem0": "loadtest.bench.others:Mem0",
}

# Of so many searches of a caller one is looked at for its recall, and its first.
_EXAMINED = 25
_MOST_EXAMINED = 60
# A get of few memories again and again is what caches are for.
_FEW = 50


@dataclass(frozen=True)
class Start:
    """Who this worker is."""

    kind: str
    endpoint: Endpoint
    workload: dict[str, int]
    callers: int
    number: int
    """Among all workers of the benchmark."""


@dataclass(frozen=True)
class Task:
    """One thing to do, for some time or for some rows."""

    section: str
    round: int
    seconds: float = 0.0
    rows: int = 0
    users: tuple[int, int] | None = None
    """For `load`: the users (first, end) whose rows are stored."""


@dataclass
class Done:
    """What came of it. `cpu_s` is what this process itself needed."""

    count: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    histogram: dict[str, int] = field(default_factory=dict)
    recalls: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)


class Worker:
    """Callers of one contender."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._workload = Workload(**start.workload)
        module, _, name = KINDS[start.kind].partition(":")
        self._contender: Contender = getattr(import_module(module), name)()

    async def open(self) -> None:
        await self._contender.open(self._start.endpoint, self._start.callers, self._workload.dimensions)

    async def close(self) -> None:
        await self._contender.close()

    async def do(self, task: Task) -> Done:
        """Does it with all callers at once."""
        self._contender.watch.levels.clear()
        done = await (self._bulk(task) if task.section in ("load", "bulk") else self._calls(task))
        done.levels = dict(self._contender.watch.levels)
        return done

    async def _calls(self, task: Task) -> Done:
        call = {"search": self._search, "store": self._store, "get": self._get, "get-hot": self._get}[task.section]
        taken, errors, examined = Histogram(), Counter[str](), list[tuple[int, Vector, list[str]]]()
        began = time.perf_counter()
        end = began + task.seconds

        async def caller(number: int) -> None:
            make = call(number, task, examined)
            while (at := time.perf_counter()) < end:
                try:
                    await make()
                except Exception as error:  # A contender's own kind of failure is counted, whatever it is.
                    errors[type(error).__name__] += 1
                    # Who is refused at once must not spin.
                    await asyncio.sleep(0.01)
                else:
                    taken.record(time.perf_counter() - at)

        cpu = time.process_time()
        async with asyncio.TaskGroup() as group:
            for number in range(self._start.callers):
                group.create_task(caller(number))
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        recalls = [self._recall(*one) for one in examined]
        return Done(taken.count, seconds, cpu_s, taken.to_json(), recalls, dict(errors))

    def _recall(self, user: int, query: Vector, found: list[str]) -> float:
        truth = self._workload.truth(user, query)
        return len(truth & set(found)) / len(truth)

    def _search(
        self, caller: int, task: Task, examined: list[tuple[int, Vector, list[str]]]
    ) -> Callable[[], Awaitable[None]]:
        questions = self._workload.questions(self._start.number * 1000 + caller, task.round)
        made = 0

        async def make() -> None:
            nonlocal made
            user, query = questions.search()
            found = await self._contender.search(caller, user_name(user), query)
            if made % _EXAMINED == 0 and len(examined) < _MOST_EXAMINED:
                examined.append((user, query, found))
            made += 1

        return make

    def _get(self, caller: int, task: Task, _: object) -> Callable[[], Awaitable[None]]:
        questions = self._workload.questions(self._start.number * 1000 + caller, task.round)
        few = [questions.get() for _ in range(_FEW)] if task.section == "get-hot" else []
        get = self._contender.get_again if few else self._contender.get
        number = 0

        async def make() -> None:
            nonlocal number
            number += 1
            user, memory_id = few[number % _FEW] if few else questions.get()
            await get(caller, user_name(user), memory_id)

        return make

    def _store(self, caller: int, task: Task, _: object) -> Callable[[], Awaitable[None]]:
        random = self._workload.stored(self._start.number, caller, task.round)
        number = 0

        async def make() -> None:
            nonlocal number
            number += 1
            user = f"writer-{int(random.integers(self._workload.users))}"
            embedding = unit_vector(random, self._workload.dimensions)
            await self._contender.store(caller, Row(user, new_id(), content(user, number), embedding))

        return make

    async def _bulk(self, task: Task) -> Done:
        """Rows are made before the time begins; each caller stores its share of them."""
        shares = [self._rows(task, number) for number in range(self._start.callers)]
        began, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for number, rows in enumerate(shares):
                if rows:
                    group.create_task(self._contender.bulk(number, rows))
        return Done(sum(map(len, shares)), time.perf_counter() - began, time.process_time() - cpu)

    def _rows(self, task: Task, caller: int) -> list[Row]:
        if task.users is not None:
            first, end = task.users
            return [
                Row(user_name(user), memory_id(user, number), content(user_name(user), number), vector)
                for user in range(first + caller, end, self._start.callers)
                for number, vector in enumerate(self._workload.rows(user))
            ]
        random = self._workload.stored(self._start.number, caller, task.round, 1)
        share = task.rows // self._start.callers
        user = f"bulk-{self._start.number}-{caller}"
        return [
            Row(user, new_id(), content(user, number), unit_vector(random, self._workload.dimensions))
            for number in range(share)
        ]


async def _main() -> None:
    commands = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    worker = Worker(Start(**json.loads(await commands.readline())))
    await worker.open()
    _say({"ready": True})
    while line := await commands.readline():
        _say(asdict(await worker.do(Task(**json.loads(line)))))
    await worker.close()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
