"""The users that the health monitor acts as: nobody may be one, and nobody sees what is theirs."""

import uuid
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import field_mask_pb2

from common.probe_user import PREFIX, probe_user
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import purge
from shard.database import Database
from shard.purge import Retention
from tests.support.cluster import LocalCluster
from tests.support.wire import (
    fields_of,
    pool_of_one,
    reason_of,
    route,
    shard_service,
    store_request,
    topology_of,
    user_slot,
)

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

DIMENSIONS = 256
DAY = Retention(tombstone_s=86400.0, version_s=86400.0)


async def refused(call: Awaitable[object], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (reason_of(error.value), fields_of(error.value)) == ("INVALID_USER_ID", [field])


@pytest.mark.parametrize("reserved", [PREFIX, probe_user("shard-0")])
async def test_no_request_may_name_a_reserved_user(api: "MemoryServiceAsyncStub", reserved: str) -> None:
    memory_id = str(uuid.uuid4())
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory_id, user_id=reserved, content="x"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
    )
    await refused(api.StoreMemory(store_request(reserved, "x")), "memory.user_id")
    await refused(api.UpdateMemory(change), "memory.user_id")
    await refused(api.GetMemory(pb.GetMemoryRequest(id=memory_id, user_id=reserved)), "user_id")
    await refused(api.DeleteMemory(pb.DeleteMemoryRequest(id=memory_id, user_id=reserved)), "user_id")
    await refused(api.ListMemories(pb.ListMemoriesRequest(user_id=reserved)), "user_id")
    await refused(api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory_id, user_id=reserved)), "user_id")
    await refused(api.SearchMemories(pb.SearchMemoriesRequest(user_id=reserved, query="x")), "user_id")
    await refused(api.EraseUser(pb.EraseUserRequest(user_id=reserved)), "user_id")
    batch = await api.BatchStoreMemories(
        pb.BatchStoreMemoriesRequest(memories=[pb.Memory(user_id=reserved, content="x")])
    )
    assert batch.results[0].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_what_is_theirs_is_found_by_nobody_and_soon_gone(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub"
) -> None:
    topology = await topology_of(cluster.catalog_dsn())
    # Another than the monitor's own, which comes and goes.
    user, word = f"{PREFIX}test-{uuid.uuid4()}", f"probing{uuid.uuid4().hex}"
    slot = user_slot(user)
    shard = topology.owner(slot)
    embedding = [0.0] * (DIMENSIONS - 1) + [1.0]
    memory = pb.Memory(
        id=str(uuid.uuid4()), user_id=user, type=pb.MEMORY_TYPE_WORKING, content=word, embedding=embedding
    )
    async with shard_service(shard.address) as internal:
        there = route(topology, shard, slot)
        await internal.Store(shard_pb2.StoreRequest(route=there, memory=memory, digest=b"d" * 32))
        own = await internal.Get(shard_pb2.GetRequest(route=there, id=memory.id, user_id=user))
        assert [found.memory.content for found in own.found] == [word]
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await api.GetMemory(pb.GetMemoryRequest(id=memory.id))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        for search in (
            pb.SearchMemoriesRequest(embedding=embedding, limit=1000),
            pb.SearchMemoriesRequest(query=word, mode=pb.SEARCH_MODE_KEYWORD),
        ):
            results = (await api.SearchMemories(search)).results
            assert not [result for result in results if result.memory.user_id.startswith(PREFIX)]
        deletion = shard_pb2.DeleteRequest(route=there, id=memory.id, user_id=user, request_id=memory.id)
        assert (await internal.Delete(deletion)).deleted
    left = """
        SELECT (SELECT count(*) FROM memories WHERE user_id = $1) + (SELECT count(*) FROM memory_versions WHERE
        user_id = $1) + (SELECT count(*) FROM applied_requests WHERE user_id = $1)
    """
    async with pool_of_one(cluster.shard_dsn(shard.shard_id)) as pool:
        assert await pool.fetchval(left, user) >= 2
        await pool.execute(
            "UPDATE memories SET deleted_at = deleted_at - interval '2 minutes' WHERE user_id = $1", user
        )
        await purge.purge(Database(pool), DAY)
        assert await pool.fetchval(left, user) == 0
