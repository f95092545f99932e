"""Searches that name no user go by one index of all memories, where operators ask for that."""

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import asyncpg
import numpy as np
import pytest
import pytest_asyncio
from pgvector import HalfVector
from pgvector.asyncpg import register_vector

from memshard.v1 import memory_pb2 as pb
from tests.integration.test_large_users import DIMENSIONS, Sea, Vectors, half_of_them, structured
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import database, memory_service

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHARDS = ("shard-0", "shard-1")
_USERS = [f"fish-{number}" for number in range(8)]
_EACH = 1500
_THRESHOLD = 1500
_QUERIES = 30
# Two that are as near as each other to the last digit may change places.
_EXACT = 0.999
_INDEX = """
SELECT indexrelid AS oid, indisvalid, ef_few, ef_many, measured_rows FROM own_indexes
JOIN pg_index ON indexrelid = to_regclass(name) WHERE name = 'memories_shared'
"""


class School(Sea):
    """A cluster whose shards have a shared index, and its API."""

    async def index(self, shard_id: str) -> asyncpg.Record | None:
        async with database(self.cluster.shard_dsn(shard_id, owner=True)) as connection:
            return await connection.fetchrow(_INDEX)

    async def everywhere(self, query: Vectors, k: int, **fields: object) -> list[pb.Memory]:
        """The memories found of all users, best first."""
        request = pb.SearchMemoriesRequest(embedding=query.tolist(), limit=k, **fields)  # type: ignore[arg-type]
        return [result.memory for result in (await self.api.SearchMemories(request)).results]

    def nearest_of_all(self, query: Vectors, k: int, kept: Sequence[bool] | None = None) -> set[tuple[str, int]]:
        """The same by looking at all of them."""
        scores = []
        for user, vectors in self.vectors.items():
            exact = vectors.astype(np.float16).astype(np.float64)
            found = exact @ query / np.linalg.norm(exact, axis=1)
            scores += [(-score, user, n) for n, score in enumerate(found) if kept is None or kept[n % len(kept)]]
        return {(user, n) for _, user, n in sorted(scores)[:k]}

    async def recall_everywhere(self, k: int, kept: Sequence[bool] | None = None, **fields: object) -> float:
        shares = []
        for query in structured(97, _QUERIES):
            memories = await self.everywhere(query, k, **fields)
            found = {(memory.user_id, int(memory.metadata["number"])) for memory in memories}  # type: ignore[arg-type]
            assert len(found) == k
            shares.append(len(found & self.nearest_of_all(query, k, kept)) / k)
        return float(np.mean(shares))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def school() -> AsyncIterator[School]:
    with pytest.MonkeyPatch.context() as patch:
        settings = {"SHARED_INDEX": "true", "OWN_INDEX_MEMORIES": _THRESHOLD, "OWN_INDEX_MOST": 0}
        for name, value in {**settings, "OWN_INDEX_INTERVAL_S": 1}.items():
            patch.setenv(f"MEMSHARD_SHARD_{name}", str(value))
        async with (
            LocalCluster(shards=2, replicas=1, embedder="none", dimensions=DIMENSIONS) as cluster,
            memory_service(cluster.address) as api,
        ):
            await cluster.run("degrade", "normal")
            vectors: Mapping[str, Vectors] = {user: structured(n, _EACH) for n, user in enumerate(_USERS)}
            school = School(cluster, Slots(cluster, {}), api, vectors)
            for user, some in vectors.items():
                await school.store(user, some)
            yield school


async def _is_proven(school: School) -> bool:
    found = [await school.index(shard_id) for shard_id in _SHARDS]
    return all(index is not None and index["ef_few"] and index["ef_many"] for index in found)


async def _is_known(school: School) -> bool:
    """Whether every server goes by it."""
    before = await school.answered("index")
    for level in (pb.READ_LEVEL_STRONG, pb.READ_LEVEL_EVENTUAL):
        for query in structured(96, 5):
            await school.everywhere(query, 1, read=pb.ReadOptions(level=level))
    return await school.answered("index") == before + 2 * 5 * len(_SHARDS)


async def test_searches_of_everybody_go_by_the_shared_index_and_find_what_an_exact_one_finds(school: School) -> None:
    await eventually(lambda: _is_proven(school), within_s=60)
    await eventually(lambda: _is_known(school), within_s=30)
    for k in (1, 10, 100):
        index, exact = await school.answered("index"), await school.answered("exact")
        # Of so few questions for one memory each, one that goes wrong is more than a hundredth.
        assert await school.recall_everywhere(k) >= (0.99 if k > 1 else 1 - 1.5 / _QUERIES), k
        assert (await school.answered("index"), await school.answered("exact")) == (
            index + _QUERIES * len(_SHARDS),
            exact,
        )


async def test_nobody_else_is_led_to_it(school: School) -> None:
    """A user's own index that is gone is missed by nobody: what would be the nearest of everybody is not looked at."""
    await eventually(lambda: _is_proven(school), within_s=60)
    index, (query,) = await school.index("shard-0"), structured(94, 1)
    assert index is not None
    scans = "SELECT pg_stat_get_xact_numscans($1)"
    async with database(school.cluster.shard_dsn("shard-0", owner=True)) as connection:
        await register_vector(connection)
        async with connection.transaction():
            await connection.fetch(
                "SELECT FROM own_index_nearest($1, $2, $3, 10, 100)", _USERS[0], 1, HalfVector(query)
            )
            assert await connection.fetchval(scans, index["oid"]) == 0
            await connection.fetch("SELECT FROM shared_index_nearest($1, 10, 100)", HalfVector(query))
            assert await connection.fetchval(scans, index["oid"]) == 1


async def test_what_it_cannot_answer_well_is_answered_exactly(school: School) -> None:
    """More results than it was measured for, and filters that leave too few of its nearest."""
    await eventually(lambda: _is_known(school), within_s=30)
    assert await school.recall_everywhere(150) >= _EXACT
    # `store` makes every second one EPISODIC.
    assert await school.recall_everywhere(10, kept=(True, False), filter=half_of_them()) >= 0.99
    exact = await school.answered("exact")
    comparison = pb.Comparison(field="metadata.of", operator=pb.OPERATOR_EQ)
    comparison.value.number_value = 7
    few = [n == 7 for n in range(100)]
    assert await school.recall_everywhere(50, kept=few, filter=pb.Filter(comparison=comparison)) >= _EXACT
    assert await school.answered("exact") > exact


async def test_what_is_stored_and_deleted_is_found_and_gone_at_once(school: School) -> None:
    await eventually(lambda: _is_known(school), within_s=30)
    (query,) = structured(95, 1)
    await school.store("newcomer", np.stack([query]))
    strong = pb.ReadOptions(level=pb.READ_LEVEL_STRONG)
    (found,) = await school.everywhere(query, 1, read=strong)
    assert found.user_id == "newcomer"
    await school.api.EraseUser(pb.EraseUserRequest(user_id="newcomer", request_id=str(uuid.uuid4())))
    assert "newcomer" not in {memory.user_id for memory in await school.everywhere(query, 10, read=strong)}


async def test_a_users_own_search_is_as_exact_as_without_it(school: School) -> None:
    index, exact = await school.answered("index"), await school.answered("exact")
    assert await school.recall(_USERS[0], 10) >= _EXACT
    assert (await school.answered("index"), await school.answered("exact")) == (index, exact)


async def test_it_is_dropped_when_it_is_not_asked_for_any_more(school: School) -> None:
    """The last test: what comes after it has no index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSHARD_SHARD_SHARED_INDEX", "false")
        await school.cluster.down()
        await school.cluster.up()

    async def gone() -> bool:
        return [await school.index(shard_id) for shard_id in _SHARDS] == [None, None]

    await eventually(gone, within_s=60)
    await eventually(school.cluster.healthy, within_s=60)
    assert await school.recall_everywhere(10) >= _EXACT
