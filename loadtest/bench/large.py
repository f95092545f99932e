"""`python -m loadtest.bench.large`: users of all sizes side by side, one of them with 100,000 memories.

How long a search takes from caller to caller, through router and shard, and how many of the nearest memories it finds,
against a look at all of them. The large user's own index is waited for, and its making is timed.
"""

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import asyncpg
import numpy as np

from loadtest.bench.__main__ import machine
from loadtest.bench.cluster import INDEX_TIMEOUT_S, POLL_S, Alone, alone
from loadtest.bench.clustered import BATCH, Routed
from loadtest.bench.contender import Endpoint, Row
from loadtest.bench.workload import K, Vector, content, memory_id, user_name

_SMALL = (1, 20, 1000)
_LOADERS = 4
# Of a search, what the project promises.
_MUST_P50_MS = 3.0
_MUST_RECALL = 0.99
# Users beside it are not large; whoever is gets the index as soon as it is seen.
_ENVIRONMENT = {
    "MEMSHARD_SHARD_OWN_INDEX_INTERVAL_S": "2",
    "MEMSHARD_SHARD_OWN_INDEX_MEMORIES": "5000",
    "MEMSHARD_SHARD_OWN_INDEX_BUILD_MB": "1024",
}
# How far a text is from what it is about.
_NOISE = 0.05

_INDEX = """
SELECT ef_few, ef_many, pg_relation_size(indexrelid) AS size_bytes FROM own_indexes
JOIN pg_index ON indexrelid = to_regclass(name) WHERE indisvalid AND measured_rows IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Line:
    """What was measured of one user."""

    memories: int
    results: int
    """The least that a search had."""
    recall: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    def faults(self) -> list[str]:
        """What of it is not as promised."""
        wrong = []
        if self.results < min(K, self.memories):
            wrong.append(f"{self.memories} memories: {self.results} results")
        if self.recall < _MUST_RECALL:
            wrong.append(f"{self.memories} memories: recall {self.recall:.4f}")
        if self.p50_ms >= _MUST_P50_MS:
            wrong.append(f"{self.memories} memories: p50 {self.p50_ms:.2f} ms")
        return wrong


class Embeddings:
    """Like those of texts: of `inner` independent directions, and a little noise; random ones if those are all."""

    def __init__(self, dimensions: int, inner: int) -> None:
        self._shape = inner, dimensions
        self._directions = np.random.default_rng(1).standard_normal(self._shape, dtype=np.float32)

    def make(self, seed: Sequence[int], count: int) -> Vector:
        """The same for the same seed; of length 1."""
        random = np.random.default_rng(seed)
        inner, dimensions = self._shape
        if inner >= dimensions:
            made = random.standard_normal((count, dimensions), dtype=np.float32)
        else:
            made = random.standard_normal((count, inner), dtype=np.float32) @ self._directions / np.sqrt(inner)
            made += _NOISE * random.standard_normal((count, dimensions), dtype=np.float32)
        unit: Vector = made / np.linalg.norm(made, axis=1, keepdims=True)
        return unit


async def measure(arguments: argparse.Namespace) -> int:
    """Loads, waits for the index, and asks; the exit code."""
    embeddings = Embeddings(arguments.dimensions, arguments.inner)
    sizes = [*_SMALL, arguments.memories]
    async with alone(arguments.dimensions, _ENVIRONMENT) as cluster:
        routed = Routed()
        await routed.open(Endpoint(address=cluster.address), _LOADERS, arguments.dimensions)
        try:
            held = {user: embeddings.make((2, user), size) for user, size in enumerate(sizes)}
            for user, vectors in held.items():
                await _load(routed, user, vectors)
            index = await _index(cluster)
            routed.watch.levels.clear()
            lines = [
                await _ask(routed, user, vectors, embeddings.make((3, user), arguments.searches))
                for user, vectors in held.items()
            ]
        finally:
            await routed.close()
    levels = dict(routed.watch.levels)
    print(_table(lines, index, arguments))
    if arguments.json:
        document = {"lines": [asdict(line) for line in lines], "index": index, "levels": levels}
        arguments.json.write(json.dumps(document, indent=2) + "\n")
    faults = [fault for line in lines for fault in line.faults()]
    if levels:
        faults.append(f"answers came under a degradation level: {levels}")
    for fault in faults:
        print(f"missed: {fault}", file=sys.stderr)
    return 1 if faults else 0


async def _load(routed: Routed, user: int, vectors: Vector) -> None:
    name = user_name(user)
    parts = iter(range(0, len(vectors), BATCH))

    async def loader() -> None:
        for first in parts:
            rows = [
                Row(name, memory_id(user, number), content(name, number), vectors[number])
                for number in range(first, min(first + BATCH, len(vectors)))
            ]
            await routed.bulk(0, rows)

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(_LOADERS):
            group.create_task(loader())
    _tell(f"{len(vectors)} memories of one user stored in {time.monotonic() - began:.0f} s")


async def _index(cluster: Alone) -> dict[str, Any]:
    """What is known of the large user's index, once the shard goes by it."""
    began = time.monotonic()
    row = await cluster.index(_INDEX)
    if row["ef_few"] is None or row["ef_many"] is None:
        _tell("the index is not good enough for these embeddings; searches stay exact")
    else:
        # As autovacuum does in time. By hand and before, it would be in the way of the index.
        connection = await asyncpg.connect(cluster.dsn)
        try:
            await connection.execute("ANALYZE memories")
        finally:
            await connection.close()
        async with asyncio.timeout(INDEX_TIMEOUT_S):
            await _until(lambda: _sample(cluster, 'memory_own_indexes{shard="shard-0",use="proven"}') >= 1)
    seconds = await asyncio.to_thread(_sample, cluster, "memory_own_index_build_duration_seconds_sum")
    _tell(f"index ready after {time.monotonic() - began:.0f} s, of which {seconds:.0f} to make it")
    return {**dict(row), "build_s": round(seconds, 1)}


async def _until(condition: Callable[[], bool]) -> None:
    while not await asyncio.to_thread(condition):  # noqa: ASYNC110  # Nobody tells us; we have to ask.
        await asyncio.sleep(POLL_S)


def _sample(cluster: Alone, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics_port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


async def _ask(routed: Routed, user: int, vectors: Vector, queries: Vector) -> Line:
    """One search after the other, after some that do not count."""
    name = user_name(user)
    for query in queries[: len(queries) // 5]:
        await routed.search(0, name, query)
    taken, answers = [], []
    for query in queries:
        began = time.perf_counter()
        answers.append(await routed.search(0, name, query))
        taken.append((time.perf_counter() - began) * 1000)
    shares = []
    for query, answer in zip(queries, answers, strict=True):
        nearest = np.argsort(-(vectors @ query), kind="stable")[:K]
        truth = {memory_id(user, int(number)) for number in nearest}
        shares.append(len(truth & set(answer)) / len(truth))
    p50, p90, p99 = np.percentile(taken, (50, 90, 99))
    return Line(len(vectors), min(map(len, answers)), float(np.mean(shares)), float(p50), float(p90), float(p99))


def _table(lines: Sequence[Line], index: dict[str, Any], arguments: argparse.Namespace) -> str:
    head = "| memories | least results | recall | p50 ms | p90 ms | p99 ms |\n|---|---|---|---|---|---|"
    rows = [
        f"| {line.memories:,} | {line.results} | {line.recall:.4f} | {line.p50_ms:.2f} | {line.p90_ms:.2f} "
        f"| {line.p99_ms:.2f} |"
        for line in lines
    ]
    about = (
        f"{arguments.dimensions} numbers in {min(arguments.inner, arguments.dimensions)} independent directions, "
        f"{arguments.searches} searches each, one after the other. The index: {index['size_bytes'] / 2**20:.0f} MiB, "
        f"made in {index['build_s']:.0f} s, ef {index['ef_few']} for {K} results. {machine()}."
    )
    return "\n".join([head, *rows, "", about])


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.large", description=__doc__)
    parser.add_argument("--memories", type=int, default=100_000, help="of the large user")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument(
        "--inner", type=int, default=24, help="independent directions of the embeddings; as many as dimensions: random"
    )
    parser.add_argument("--searches", type=int, default=500, help="of each user")
    parser.add_argument("--json", type=argparse.FileType("w"), help="a file for all figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(asyncio.run(measure(_parse(None))))
