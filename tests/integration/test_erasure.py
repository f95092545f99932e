"""Erasures that meet other requests, each other, and what an erasure that broke off has left: at one shard."""

import asyncio
import hashlib
import uuid
from typing import TYPE_CHECKING

import pytest

from common.topology import Shard, Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import purge
from shard.database import Database
from shard.purge import Retention
from tests.integration.conftest import Somewhere
from tests.integration.test_everywhere import contents, store_some, update_request
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, pool_of_one, route, shard_service, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

MOST_IDS = 20_000  # In one answer.
DAY_S = 86400.0
KEPT_IDS = "SELECT count(*) FROM erased_ids WHERE user_hash = $1"


def hash_of(user: str) -> bytes:
    return hashlib.sha256(user.encode()).digest()


async def owner_of(cluster: LocalCluster, user: str) -> tuple[Topology, Shard]:
    topology = await topology_of(cluster.catalog_dsn())
    return topology, topology.owner(user_slot(user))


async def test_a_memory_and_its_versions_go_together(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    """Versions without a memory would be in the way of the next one with its id."""
    memory = (await api.StoreMemory(store_request(user, "first"))).memory
    await api.UpdateMemory(update_request(memory, "content", content="second"))
    _, shard = await owner_of(cluster, user)
    async with database(cluster.shard_dsn(shard.shard_id)) as connection:
        async with connection.transaction():
            await connection.execute("SELECT FROM memory_versions WHERE user_id = $1 FOR UPDATE", user)
            erasing = asyncio.ensure_future(api.EraseUser(pb.EraseUserRequest(user_id=user)))
            await eventually(lambda: connection.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
            async with database(cluster.shard_dsn(shard.shard_id)) as other:
                assert await other.fetchval("SELECT count(*) FROM memories WHERE user_id = $1", user) == 1
        assert ((await erasing).memories_erased, (await erasing).versions_erased) == (1, 1)
        assert await connection.fetchval("SELECT count(*) FROM memory_versions WHERE user_id = $1", user) == 0


async def test_versions_that_an_erasure_left_are_in_nobodys_way_nor_sight(everywhere: Somewhere, user: str) -> None:
    """Of an erasure by an older version that broke off, say: then the ids are used again."""
    updated, deleted, listed = await store_some(everywhere, user, 3)
    leave = """
        INSERT INTO memory_versions (slot, user_id, id, version, agent_id, session_id, type, importance, content,
                                     metadata, embedding_model, pending, create_time, update_time)
        SELECT slot, user_id, id, version, '', '', type, importance, 'of an earlier life', '{}', '', false, now(), now()
        FROM (SELECT slot, user_id, id, type, importance FROM memories WHERE user_id = $1) AS memory,
             generate_series(1, 3) AS version
    """
    for shard in (await topology_of(everywhere.cluster.catalog_dsn())).shards:
        async with database(everywhere.cluster.shard_dsn(shard.shard_id)) as connection:
            await connection.execute(leave, user)

    async def versions(memory: pb.Memory) -> list[tuple[int, str]]:
        request = pb.ListMemoryVersionsRequest(id=memory.id, user_id=user)
        return [(v.version, v.content) for v in (await everywhere.api.ListMemoryVersions(request)).versions]

    assert await versions(listed) == [(1, listed.content)]
    change = update_request(updated, "content", content="second")
    assert (await everywhere.api.UpdateMemory(change)).memory.version == 2
    assert await versions(updated) == [(2, "second"), (1, updated.content)]
    assert (await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=deleted.id, user_id=user))).deleted
    assert await versions(deleted) == [(1, "")]
    await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=updated.id, user_id=user))
    assert await versions(updated) == [(2, ""), (1, "")]
    await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=user))
    for shard in (await topology_of(everywhere.cluster.catalog_dsn())).shards:
        async with database(everywhere.cluster.shard_dsn(shard.shard_id)) as connection:
            assert not await connection.fetchval("SELECT count(*) FROM memory_versions WHERE user_id = $1", user)


async def test_erasures_of_one_user_take_turns(cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str) -> None:
    """They would delete the same rows in different orders, and wait for each other in a ring."""
    await api.StoreMemory(store_request(user, "erased by both"))
    _, shard = await owner_of(cluster, user)
    waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND locktype = $1"
    async with database(cluster.shard_dsn(shard.shard_id)) as connection:
        async with connection.transaction():
            await connection.execute("SELECT FROM memories WHERE user_id = $1 FOR UPDATE", user)
            first = asyncio.ensure_future(erase(cluster, user, "first"))
            await eventually(lambda: connection.fetchval(waiting, "transactionid"))
            second = asyncio.ensure_future(erase(cluster, user, "second"))
            await eventually(lambda: connection.fetchval(waiting, "advisory"))
        assert ((await first).memories_erased, (await second).memories_erased) == (1, 0)


async def test_erasures_of_one_user_at_once_all_succeed(everywhere: Somewhere, user: str) -> None:
    for round_ in range(8):
        memories = [
            pb.Memory(id=str(uuid.uuid4()), user_id=user, content=f"{round_} {n}", embedding=[1.0] * 256)
            for n in range(300)
        ]
        await everywhere.api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories), timeout=30)
        requests = [pb.EraseUserRequest(user_id=user, request_id=f"{round_} {which}") for which in ("a", "a", "b", "c")]
        answers = await asyncio.gather(*(everywhere.api.EraseUser(request) for request in requests))
        assert answers[0].memories_erased + answers[2].memories_erased + answers[3].memories_erased >= 300
    assert await contents(everywhere, user) == []


async def erase(
    cluster: LocalCluster, user: str, request_id: str = "erase", forgotten: list[str] | None = None
) -> shard_pb2.EraseResponse:
    """As a router asks."""
    topology, shard = await owner_of(cluster, user)
    async with shard_service(shard.address) as stub:
        request = shard_pb2.EraseRequest(
            route=route(topology, shard, user_slot(user)), user_id=user, request_id=request_id, forgotten=forgotten
        )
        return await stub.Erase(request, timeout=30)


async def test_a_shard_names_erased_ids_until_it_hears_that_all_caches_have_forgotten_them(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    stored = [(await api.StoreMemory(store_request(user, f"memory {n}"))).memory for n in range(3)]
    ids = sorted(memory.id for memory in stored)
    for request_id in ("erase", "erase", "another"):
        assert sorted((await erase(cluster, user, request_id)).ids) == ids
    answer = await erase(cluster, user, forgotten=ids[:2])
    assert (answer.memories_erased, list(answer.ids)) == (3, ids[2:])
    assert (await erase(cluster, f"{user}-other", forgotten=ids)).ids == []
    assert list((await erase(cluster, user)).ids) == ids[2:]
    answer = await erase(cluster, user, "another", forgotten=ids[2:])
    assert (answer.memories_erased, list(answer.ids)) == (0, [])
    assert (await erase(cluster, user)).memories_erased == 3


async def test_more_ids_than_one_answer_has_come_in_the_next(cluster: LocalCluster, user: str) -> None:
    _, shard = await owner_of(cluster, user)
    count = MOST_IDS + 500
    async with database(cluster.shard_dsn(shard.shard_id)) as connection:
        await connection.execute(
            """
            INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                                  embedding_model)
            SELECT $1, $2, gen_random_uuid(), '', '', '', 1, 0.5, '', '{}', '' FROM generate_series(1, $3)
            """,
            user_slot(user),
            user,
            count,
        )
        known = {str(row["id"]) for row in await connection.fetch("SELECT id FROM memories WHERE user_id = $1", user)}
        told: list[str] = []
        answer = await erase(cluster, user)
        while answer.ids:
            assert len(answer.ids) <= MOST_IDS
            told += answer.ids
            answer = await erase(cluster, user, forgotten=list(answer.ids))
        assert (len(told), set(told)) == (count, known)
        assert answer.memories_erased == count
        assert not await connection.fetchval(KEPT_IDS, hash_of(user))


async def test_ids_that_nobody_asks_for_again_are_kept_for_a_day(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    await api.StoreMemory(store_request(user, "erased"))
    await erase(cluster, user)
    _, shard = await owner_of(cluster, user)
    retention = Retention(tombstone_s=DAY_S, version_s=DAY_S)
    async with pool_of_one(cluster.shard_dsn(shard.shard_id)) as pool:
        for hours, left in ((0, 1), (23, 1), (2, 0)):
            await pool.execute("UPDATE erased_ids SET erased_at = erased_at - make_interval(hours => $1)", hours)
            await purge.purge(Database(pool), retention)
            assert await pool.fetchval(KEPT_IDS, hash_of(user)) == left
    assert (await erase(cluster, user)).ids == []


@pytest.mark.parametrize("attempt", ["the same", "another"])
async def test_what_came_since_an_erasure_is_not_erased_by_its_repetition(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str, attempt: str
) -> None:
    """Ids that are told once more are of what went, though one of them may be in use again."""
    memory_id = (await api.StoreMemory(store_request(user, "before"))).memory.id
    await erase(cluster, user, "the same")
    await api.StoreMemory(store_request(user, "since", memory_id))
    answer = await erase(cluster, user, attempt, forgotten=[])
    assert list(answer.ids) == [memory_id]
    assert answer.memories_erased == 1
    listed = (await api.ListMemories(pb.ListMemoriesRequest(user_id=user))).memories
    assert [memory.content for memory in listed] == (["since"] if attempt == "the same" else [])
