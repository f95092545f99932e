"""A shard that is told to replaces its connections to its database, and says how many are in use."""

import asyncio
from typing import TYPE_CHECKING

from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, shard_service, store_request, topology_of, user_slot

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
        short = await internal.Describe(shard_pb2.DescribeRequest(without_owned=True))
        assert (list(short.owned), bool(said[0].owned), short.writable) == ([], True, True)
    listed = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert [memory.content for memory in listed.memories] == ["stored before"]
