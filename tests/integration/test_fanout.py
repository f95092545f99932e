"""A search over all users equals brute force, and says which shards it lacks."""

import asyncio
import os
import random
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import pytest_asyncio

from memshard.v1 import memory_pb2 as pb
from tests.support.brute_force import BruteForce, assert_same
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import memory_service, reason_of, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

DIMENSIONS = 24
USERS = 40
MEMORIES = 600


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def vectors() -> AsyncIterator[LocalCluster]:
    """Three shards to which callers bring embeddings."""
    async with LocalCluster(shards=3, embedder="none", dimensions=DIMENSIONS) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bare(vectors: LocalCluster) -> "AsyncIterator[MemoryServiceAsyncStub]":
    async with memory_service(vectors.address) as stub:
        yield stub


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stored(bare: "MemoryServiceAsyncStub") -> dict[str, tuple[str, list[float]]]:
    """Memory id → (user, embedding). A tenth of the embeddings are equal, so that ties happen."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(MEMORIES, DIMENSIONS))
    rows[:: MEMORIES // 60] = rows[0]
    known: dict[str, tuple[str, list[float]]] = {}
    for row in rows:
        known[str(uuid.uuid4())] = (f"user-{generator.integers(USERS)}", row.astype(np.float32).tolist())
    requests = [
        store_request(user, "a vector", memory_id, embedding=vector) for memory_id, (user, vector) in known.items()
    ]
    for start in range(0, len(requests), 50):
        await asyncio.gather(*(bare.StoreMemory(request) for request in requests[start : start + 50]))
    return known


def brute_force(
    stored: dict[str, tuple[str, list[float]]], query: list[float], user: str | None = None
) -> list[tuple[str, float]]:
    return BruteForce(stored).ranking(query, user)


@pytest.mark.parametrize(("limit", "offset"), [(10, 0), (1, 0), (100, 0), (37, 61), (1000, 0)])
async def test_a_search_over_three_shards_equals_brute_force(
    bare: "MemoryServiceAsyncStub", stored: dict[str, tuple[str, list[float]]], limit: int, offset: int
) -> None:
    for query in random.sample([vector for _, vector in stored.values()], 5):
        found = await bare.SearchMemories(pb.SearchMemoriesRequest(embedding=query, limit=limit, offset=offset))
        assert_same(list(found.results), brute_force(stored, query), limit, offset)
        assert (found.report.shards.total, found.report.shards.succeeded) == (3, 3)


async def test_a_small_user_among_large_ones_gets_all_of_its_results(
    bare: "MemoryServiceAsyncStub", stored: dict[str, tuple[str, list[float]]]
) -> None:
    for user in {owner for owner, _ in stored.values()}:
        query = random.choice(list(stored.values()))[1]
        found = await bare.SearchMemories(pb.SearchMemoriesRequest(user_id=user, embedding=query, limit=1000))
        assert_same(list(found.results), brute_force(stored, query, user), 1000, 0)


async def test_no_result_is_below_the_least_score(
    bare: "MemoryServiceAsyncStub", stored: dict[str, tuple[str, list[float]]]
) -> None:
    query = random.choice(list(stored.values()))[1]
    expected = [item for item in brute_force(stored, query) if item[1] >= 0.1]
    found = await bare.SearchMemories(pb.SearchMemoriesRequest(embedding=query, limit=1000, min_score=0.1))
    assert_same(list(found.results), expected, 1000, 0)


async def test_a_search_by_text_without_an_embedder_names_the_field(bare: "MemoryServiceAsyncStub") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await bare.SearchMemories(pb.SearchMemoriesRequest(query="text"))
    assert reason_of(refused.value) == "EMBEDDING_REQUIRED"


@contextmanager
def stopped(cluster: LocalCluster, *names: str) -> Iterator[None]:
    pids = [cluster.kill(name, signal.SIGSTOP) for name in names]
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_a_shard_that_does_not_answer_is_named_and_the_others_results_come_in_time(
    vectors: LocalCluster, bare: "MemoryServiceAsyncStub", stored: dict[str, tuple[str, list[float]]]
) -> None:
    query = random.choice(list(stored.values()))[1]
    request = pb.SearchMemoriesRequest(embedding=query, limit=1000)
    everything = {result.memory.id for result in (await bare.SearchMemories(request)).results}
    with stopped(vectors, "shard-1"):
        partial = await bare.SearchMemories(request, timeout=5)
        shards = partial.report.shards
        assert (shards.total, shards.succeeded, [f.shard_id for f in shards.failed]) == (3, 2, ["shard-1"])
        assert shards.failed[0].status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert 0 < len(partial.results) < len(everything)
        request.require_all_shards = True
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await bare.SearchMemories(request, timeout=5)
        assert (missing.value.code(), reason_of(missing.value)) == (grpc.StatusCode.UNAVAILABLE, "SHARDS_MISSING")
    again = await bare.SearchMemories(request)
    assert {result.memory.id for result in again.results} == everything


async def test_with_every_shard_away_a_search_is_unavailable_never_empty(
    vectors: LocalCluster, bare: "MemoryServiceAsyncStub"
) -> None:
    with stopped(vectors, "shard-0", "shard-1", "shard-2"), pytest.raises(grpc.aio.AioRpcError) as missing:
        await bare.SearchMemories(pb.SearchMemoriesRequest(embedding=[1.0] * DIMENSIONS), timeout=5)
    assert (missing.value.code(), reason_of(missing.value)) == (grpc.StatusCode.UNAVAILABLE, "SHARDS_MISSING")
    await eventually(vectors.healthy, within_s=10)


async def test_a_killed_shard_is_named_at_once(vectors: LocalCluster, bare: "MemoryServiceAsyncStub") -> None:
    request = pb.SearchMemoriesRequest(embedding=[1.0] * DIMENSIONS, limit=1)
    vectors.kill("shard-2")

    async def named() -> bool:
        failed = (await bare.SearchMemories(request, timeout=5)).report.shards.failed
        return [failure.shard_id for failure in failed] == ["shard-2"]

    await eventually(named)

    async def whole_again() -> bool:
        return not (await bare.SearchMemories(request, timeout=5)).report.shards.failed

    await eventually(whole_again, within_s=15)
