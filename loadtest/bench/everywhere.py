"""`python -m loadtest.bench.everywhere`: searches that name no user, with and without the index of all memories.

How long such a search takes from caller to caller, how many of the nearest memories of all users it finds, and what the
index costs: its making, and every store from then on. Two clusters of one shard, one after the other, with the same
data.
"""

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.bench.__main__ import machine
from loadtest.bench.cluster import Alone, alone
from loadtest.bench.clustered import Routed
from loadtest.bench.contender import Endpoint, Row
from loadtest.bench.large import Embeddings
from loadtest.bench.workload import K, Vector, content, memory_id, user_name

_CALLERS = 8
_MUST_RECALL = 0.99
# As long as servers take to hear of an index (shard/large_users/known.py), and some more.
_KNOWN_S = 5.0
_WITHOUT = {"MEMSHARD_SHARD_OWN_INDEX_MOST": "0"}
_WITH = {
    **_WITHOUT,
    "MEMSHARD_SHARD_SHARED_INDEX": "true",
    "MEMSHARD_SHARD_OWN_INDEX_INTERVAL_S": "2",
    "MEMSHARD_SHARD_OWN_INDEX_BUILD_MB": "1024",
}
_INDEX = """
SELECT ef_few, pg_relation_size(indexrelid) AS size_bytes FROM own_indexes
JOIN pg_index ON indexrelid = to_regclass(name) WHERE indisvalid AND measured_rows IS NOT NULL AND key IS NULL
"""


@dataclass(frozen=True, slots=True)
class Line:
    """What was measured in one of the two clusters."""

    what: str
    recall: float
    p50_ms: float
    p99_ms: float
    stores_per_s: float
    about: str


@dataclass(frozen=True, slots=True)
class Memories:
    """The embeddings of all users, user by user, and the questions that are asked about all of them."""

    held: Sequence[Vector]
    queries: Vector
    more: Vector
    """To be stored one by one."""

    def truth(self, query: Vector) -> set[str]:
        """The nearest, by looking at all of them."""
        scores = np.concatenate([vectors @ query for vectors in self.held])
        ids = ((user, number) for user, vectors in enumerate(self.held) for number in range(len(vectors)))
        names = dict(enumerate(ids))
        return {memory_id(*names[int(place)]) for place in np.argsort(-scores, kind="stable")[:K]}


async def measure(arguments: argparse.Namespace) -> int:
    """Measures both; the exit code."""
    embeddings = Embeddings(arguments.dimensions, arguments.inner)
    memories = Memories(
        [embeddings.make((2, user), arguments.memories) for user in range(arguments.users)],
        embeddings.make((3, 0), arguments.searches),
        embeddings.make((4, 0), 20_000),
    )
    truths = [memories.truth(query) for query in memories.queries]
    lines: list[Line] = []
    levels: dict[str, int] = {}
    for what, environment in (("exact", _WITHOUT), ("shared index", _WITH)):
        async with alone(arguments.dimensions, environment) as cluster:
            routed = Routed()
            await routed.open(Endpoint(address=cluster.address), _CALLERS, arguments.dimensions)
            try:
                await _load(routed, memories)
                about = "" if environment is _WITHOUT else await _index(cluster)
                routed.watch.levels.clear()
                lines.append(await _line(what, routed, memories, truths, arguments.seconds, about))
            finally:
                await routed.close()
            levels |= routed.watch.levels
    print(_table(lines, arguments))
    faults = [f"{line.what}: recall {line.recall:.4f}" for line in lines if line.recall < _MUST_RECALL]
    if levels:
        faults.append(f"answers came under a degradation level: {levels}")
    for fault in faults:
        print(f"missed: {fault}", file=sys.stderr)
    return 1 if faults else 0


async def _load(routed: Routed, memories: Memories) -> None:
    users = iter(enumerate(memories.held))

    async def loader() -> None:
        for user, vectors in users:
            await routed.bulk(0, [_row(user, number, vector) for number, vector in enumerate(vectors)])

    async with asyncio.TaskGroup() as group:
        for _ in range(_CALLERS):
            group.create_task(loader())


async def _index(cluster: Alone) -> str:
    """What is to be said of the index, once the shard goes by it."""
    began = time.monotonic()
    row = await cluster.index(_INDEX)
    seconds = time.monotonic() - began
    await asyncio.sleep(_KNOWN_S)
    return f"The index: {row['size_bytes'] / 2**20:.0f} MiB, ready after {seconds:.0f} s, ef {row['ef_few']} for {K}."


async def _line(
    what: str, routed: Routed, memories: Memories, truths: Sequence[set[str]], seconds: float, about: str
) -> Line:
    """One search after the other, after some that do not count; then stores by all callers at once."""
    for query in memories.queries[: len(memories.queries) // 5]:
        await routed.search_all(query)
    taken, shares = [], []
    for query, truth in zip(memories.queries, truths, strict=True):
        began = time.perf_counter()
        found = await routed.search_all(query)
        taken.append((time.perf_counter() - began) * 1000)
        shares.append(len(truth & set(found)) / len(truth))
    p50, p99 = np.percentile(taken, (50, 99))
    return Line(what, float(np.mean(shares)), float(p50), float(p99), await _stores(routed, memories, seconds), about)


async def _stores(routed: Routed, memories: Memories, seconds: float) -> float:
    """Stores a second, of users that have memories already."""
    numbers, ends = itertools.count(), time.monotonic() + seconds

    async def caller() -> int:
        done = 0
        while time.monotonic() < ends:
            number = next(numbers)
            user = number % len(memories.held)
            place = len(memories.held[user]) + number
            await routed.store(0, _row(user, place, memories.more[number % len(memories.more)]))
            done += 1
        return done

    return sum(await asyncio.gather(*(caller() for _ in range(_CALLERS)))) / seconds


def _row(user: int, number: int, vector: Vector) -> Row:
    name = user_name(user)
    return Row(name, memory_id(user, number), content(name, number), vector)


def _table(lines: Sequence[Line], arguments: argparse.Namespace) -> str:
    head = "| searches of everybody | recall | p50 ms | p99 ms | stores/s |\n|---|---|---|---|---|"
    rows = [
        f"| {line.what} | {line.recall:.4f} | {line.p50_ms:.1f} | {line.p99_ms:.1f} | {line.stores_per_s:,.0f} |"
        for line in lines
    ]
    about = (
        f"{arguments.users} users with {arguments.memories} memories each on one shard, {arguments.dimensions} numbers "
        f"in {min(arguments.inner, arguments.dimensions)} independent directions, {arguments.searches} searches "
        f"one after the other; {_CALLERS} callers store. {' '.join(line.about for line in lines if line.about)} "
        f"{machine()}."
    )
    return "\n".join([head, *rows, "", about])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.everywhere", description=__doc__)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--memories", type=int, default=500, help="of each user")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument(
        "--inner", type=int, default=24, help="independent directions of the embeddings; as many as dimensions: random"
    )
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long memories are stored one by one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(asyncio.run(measure(_parse(None))))
