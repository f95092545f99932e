"""A database or a shard that goes away in the middle of a write: the same request again settles it."""

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import grpc
import pytest

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@pytest.mark.parametrize("victim", ["postgres-{shard}", "{shard}"])
async def test_a_write_that_loses_its_server_is_in_doubt_and_the_same_request_settles_it(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str, victim: str
) -> None:
    topology = await topology_of(cluster.catalog_dsn())
    shard = topology.owner(user_slot(user))
    request = store_request(user, "in doubt", "0190b5a4-7b3c-7def-8123-456789abcdef")

    async def somebody_waits() -> bool:
        async with database(cluster.shard_dsn(shard.shard_id)) as other:
            return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    async with database(cluster.shard_dsn(shard.shard_id, owner=True)) as fence:
        transaction = fence.transaction()
        await transaction.start()
        await fence.execute("UPDATE owned_slots SET state = 'fenced' WHERE slot = $1", user_slot(user))
        store = asyncio.ensure_future(api.StoreMemory(request, timeout=20))
        await eventually(somebody_waits)
        # As long as it lies still, nobody starts the server again for the router to settle it there by itself.
        supervisor = cluster.kill("supervisor", signal.SIGSTOP)
        try:
            cluster.kill(victim.format(shard=shard.shard_id), signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                await store
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert (lost.value.code(), reason_of(lost.value)) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
        if "postgres" not in victim:
            await transaction.rollback()
    await eventually(cluster.healthy, within_s=20)
    await eventually(lambda: api.StoreMemory(request, timeout=5), within_s=20)
    listed = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert [memory.content for memory in listed.memories] == ["in doubt"]


async def test_reads_while_the_database_is_away_are_unavailable_and_say_when_to_try_again(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    topology = await topology_of(cluster.catalog_dsn())
    shard = topology.owner(user_slot(user))

    async def refused() -> str:
        try:
            await api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=1)
        except grpc.aio.AioRpcError as error:
            return reason_of(error) if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        return ""

    # As long as it lies still, nobody starts the database again.
    supervisor = cluster.kill("supervisor", signal.SIGSTOP)
    try:
        cluster.kill(f"postgres-{shard.shard_id}")
        assert await eventually(refused, within_s=10) == "DATABASE_UNAVAILABLE"
    finally:
        os.kill(supervisor, signal.SIGCONT)
    await eventually(cluster.healthy, within_s=20)
    await eventually(lambda: api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=5), within_s=10)
