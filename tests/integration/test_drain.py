"""SIGTERM: health first, then the calls in flight finish, and nothing new is taken."""

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, memory_service, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def lock_waiters(cluster: LocalCluster, shard_id: str) -> int:
    async with database(cluster.shard_dsn(shard_id)) as connection:
        count: int = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return count


async def drained_with_a_store_in_flight(cluster: LocalCluster, user: str, name: str, address: str) -> None:
    """Holds a store up in the database, sends SIGTERM to `name`, and lets the store go once its health has turned."""
    topology = await topology_of(cluster.catalog_dsn())
    shard = topology.owner(user_slot(user))
    async with (
        memory_service(cluster.address) as api,
        grpc.aio.insecure_channel(address) as channel,
        database(cluster.shard_dsn(shard.shard_id, owner=True)) as fence,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)  # Its published stubs lack the methods.
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        transaction = fence.transaction()
        await transaction.start()
        await fence.execute("UPDATE owned_slots SET state = 'fenced' WHERE slot = $1", user_slot(user))
        store = asyncio.ensure_future(api.StoreMemory(store_request(user, "in flight"), timeout=20))
        await eventually(lambda: lock_waiters(cluster, shard.shard_id), within_s=10)
        cluster.kill(name, signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        await transaction.rollback()
        answer = await store
        watch.cancel()
    assert answer.memory.content == "in flight"


async def test_a_shard_finishes_the_write_in_flight_before_it_stops(cluster: LocalCluster, user: str) -> None:
    topology = await topology_of(cluster.catalog_dsn())
    shard = topology.owner(user_slot(user))
    before = cluster.pid(shard.shard_id)
    await drained_with_a_store_in_flight(cluster, user, shard.shard_id, shard.address)
    await eventually(lambda: cluster.pid(shard.shard_id) != before, within_s=15)
    await eventually(cluster.healthy, within_s=20)


async def test_a_router_finishes_the_call_in_flight_before_it_stops(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    before = cluster.pid("router-0")
    await drained_with_a_store_in_flight(cluster, user, "router-0", cluster.address)
    await eventually(lambda: cluster.pid("router-0") != before, within_s=15)
    await eventually(cluster.healthy, within_s=20)
    stored = await api.StoreMemory(store_request(user, "after the restart"), wait_for_ready=True, timeout=10)
    assert stored.memory.id
