"""What a deleted memory leaves behind is cleaned up after its day, in batches."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import field_mask_pb2, timestamp_pb2

from common.breaker import speaks_of_callee
from common.errors import Unavailable
from memshard.ids import new_id
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import identity, purge, store
from shard.database import Database
from shard.purge import Retention
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import pool_of_one, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

DAY = Retention(tombstone_s=86400.0, version_s=86400.0)
MEMORIES = 7


async def test_what_has_expired_is_emptied_and_its_id_stays_taken_for_a_day(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    soon = timestamp_pb2.Timestamp()
    soon.FromDatetime(datetime.now(UTC) + timedelta(seconds=5))
    stored = (await api.StoreMemory(store_request(user, "soon gone", expire_time=soon))).memory
    shard = (await topology_of(cluster.catalog_dsn())).owner(user_slot(user))
    async with pool_of_one(cluster.shard_dsn(shard.shard_id)) as pool:
        database = Database(pool)

        async def emptied() -> bool:
            await purge.purge(database, DAY)
            row = await pool.fetchrow("SELECT content, deleted_at FROM memories WHERE user_id = $1", user)
            return row is not None and row["content"] == "" and row["deleted_at"] is not None

        await eventually(emptied, within_s=20)
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await api.StoreMemory(store_request(user, "another", stored.id))
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_tombstones_and_request_ids_go_after_a_day_and_not_before(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    stored = [(await api.StoreMemory(store_request(user, f"memory {n}"))).memory for n in range(MEMORIES)]
    for memory in stored:
        await api.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user))
    kept = (await api.StoreMemory(store_request(user, "kept"))).memory
    shard = (await topology_of(cluster.catalog_dsn())).owner(user_slot(user))
    async with pool_of_one(cluster.shard_dsn(shard.shard_id)) as pool:
        database = Database(pool)
        assert await purge.purge(database, DAY) == 0
        for table, column in (("memories", "deleted_at"), ("applied_requests", "applied_at")):
            await pool.execute(
                f"UPDATE {table} SET {column} = {column} - interval '25 hours' "
                f"WHERE user_id = $1 AND {column} IS NOT NULL",
                user,
            )
        assert await purge.purge(database, DAY, batch=2) == 2 * MEMORIES
    listed = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert [memory.id for memory in listed.memories] == [kept.id]
    # The id is free again, for anything, and its versions begin anew.
    again = await api.StoreMemory(store_request(user, "something else", stored[0].id))
    assert again.memory.version == 1
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=stored[0].id, user_id=user, content="changed"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
    )
    assert (await api.UpdateMemory(change)).memory.version == 2
    assert (await api.DeleteMemory(pb.DeleteMemoryRequest(id=stored[0].id, user_id=user))).deleted


async def test_versions_are_kept_for_their_retention_and_no_longer(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    memory = (await api.StoreMemory(store_request(user, "version 1"))).memory
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, user_id=user, content="version 2"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
    )
    await api.UpdateMemory(change)
    versions = pb.ListMemoryVersionsRequest(id=memory.id, user_id=user)
    shard = (await topology_of(cluster.catalog_dsn())).owner(user_slot(user))
    async with pool_of_one(cluster.shard_dsn(shard.shard_id)) as pool:
        database = Database(pool)
        await purge.purge(database, DAY)
        assert [v.content for v in (await api.ListMemoryVersions(versions)).versions] == ["version 2", "version 1"]
        await pool.execute(
            "UPDATE memory_versions SET replaced_at = replaced_at - interval '25 hours' WHERE user_id = $1", user
        )
        await purge.purge(database, DAY)
    assert [v.content for v in (await api.ListMemoryVersions(versions)).versions] == ["version 2"]


# A purge that always comes between the insert and the look at what that met.
_SKIPS = """
CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER skips BEFORE INSERT ON memories FOR EACH ROW EXECUTE FUNCTION skip()
"""


async def test_a_row_that_is_being_purged_says_nothing_of_the_shard(cluster: LocalCluster, user: str) -> None:
    slot = user_slot(user)
    shard = (await topology_of(cluster.catalog_dsn())).owner(slot)
    memory = pb.Memory(id=new_id(), user_id=user, content="at last")
    item = shard_pb2.StoreItem(slot=slot, memory=memory, digest=b"d" * 32)
    async with pool_of_one(cluster.shard_dsn(shard.shard_id, owner=True)) as pool, pool.acquire() as connection:
        known = await identity.read(connection)
        assert known is not None
        trying = connection.transaction()
        await trying.start()
        try:
            await connection.execute(_SKIPS)
            with pytest.raises(Unavailable) as refused:
                await store.store(connection, known, slot, memory, item.digest)
            (outcome,), _ = await store.store_many(connection, known, [item])
        finally:
            await trying.rollback()
    assert isinstance(outcome, Unavailable)
    assert [speaks_of_callee(error) for error in (refused.value, outcome)] == [False, False]
