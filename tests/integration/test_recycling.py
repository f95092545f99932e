"""A shard that is told to replaces its connections to its database, once a minute, and says how many are in use."""

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

from common.deadline import Deadline
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard.database import Database
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, pool_of_one, route, shard_service, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

# More at once than the pool has, so that each of its connections is lent.
CALLS = 64


async def test_every_connection_is_another_one_and_nobody_notices(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    await api.StoreMemory(store_request(user, "stored before"))
    shard = (await topology_of(cluster.catalog_dsn())).owner(user_slot(user))
    async with shard_service(shard.address) as internal, database(cluster.shard_dsn(shard.shard_id)) as connection:

        async def backends() -> set[int]:
            rows = await connection.fetch(
                "SELECT pid FROM pg_stat_activity WHERE application_name = $1", f"memshard {shard.shard_id}"
            )
            return {row["pid"] for row in rows}

        async def describe() -> shard_pb2.DescribeResponse:
            return await internal.Describe(shard_pb2.DescribeRequest())

        async def several_at_once() -> list[shard_pb2.DescribeResponse]:
            said = await asyncio.gather(*(describe() for _ in range(CALLS)))
            return said if max(one.pool_in_use for one in said) > 1 else []

        await asyncio.gather(*(describe() for _ in range(CALLS)))
        before = await backends()
        assert len(before) > 1
        answer = await internal.RecyclePool(shard_pb2.RecyclePoolRequest())
        assert 1 < answer.replaced <= len(before)
        said = await eventually(several_at_once)

        async def all_are_new() -> bool:
            # The last of the old ones are closed when somebody wants them.
            await asyncio.gather(*(describe() for _ in range(CALLS)))
            return not before & await backends()

        await eventually(all_are_new)
        assert all(0 <= one.pool_in_use <= one.pool_size == 16 for one in said)
        assert all(0 < one.disk_free_bytes < one.disk_bytes for one in said)
        assert all(0 < one.cpu <= 1 and 0 < one.memory < 1 for one in said)
        short = await internal.Describe(shard_pb2.DescribeRequest(without_owned=True))
        assert (list(short.owned), bool(said[0].owned), short.writable) == ([], True, True)
    listed = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert [memory.content for memory in listed.memories] == ["stored before"]


async def test_connections_are_replaced_once_a_minute_however_many_ask(cluster: LocalCluster) -> None:
    """Each router finds for itself that something is wrong."""
    async with pool_of_one(cluster.shard_dsn("shard-0")) as pool:
        here = Database(pool)

        async def backend() -> int:
            async with here.reading(Deadline.after(10)) as connection:
                pid: int = await connection.fetchval("SELECT pg_backend_pid()")
                return pid

        first = await backend()
        assert await here.recycle_on_request() == 1
        second = await backend()
        assert second != first
        assert await here.recycle_on_request() == 0
        assert await backend() == second
        # Whoever knows that they must go is not held up.
        assert await here.recycle() == 1
        assert await backend() != second


async def test_a_pool_that_is_full_is_told_of_at_once_and_its_database_is_asked_again_when_it_is_not(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    await api.StoreMemory(store_request(user, "there"))
    topology = await topology_of(cluster.catalog_dsn())
    slot = user_slot(user)
    shard = topology.owner(slot)
    listing = shard_pb2.ListRequest(user_id=user, page_size=1, route=route(topology, shard, slot))
    short = shard_pb2.DescribeRequest(without_owned=True)
    async with (
        shard_service(shard.address) as internal,
        database(cluster.shard_dsn(shard.shard_id, owner=True)) as holder,
    ):
        async with holder.transaction():
            await holder.execute("LOCK TABLE memories IN ACCESS EXCLUSIVE MODE")
            # Each waits for the lock for three seconds, and those that have no connection for one.
            hanging = [internal.List(listing, timeout=60) for _ in range(60)]

            async def full() -> shard_pb2.DescribeResponse | None:
                said: shard_pb2.DescribeResponse = await internal.Describe(short, timeout=2)
                return said if said.database_silent_ms else None

            said = await eventually(full)
            assert said is not None
            assert (said.shard_id, said.pool_size, said.pool_in_use) == (shard.shard_id, 16, 16)
            assert said.disk_bytes
            assert not said.writable
            later = await internal.Describe(short, timeout=2)
            assert later.database_silent_ms > said.database_silent_ms
            # Who wants to know what it owns is told nothing rather than half of it.
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await internal.Describe(shard_pb2.DescribeRequest(), timeout=1)
            assert raised.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        await asyncio.gather(*hanging, return_exceptions=True)
        again = await internal.Describe(short, timeout=2)
        assert (again.writable, again.database_silent_ms) == (True, 0)
