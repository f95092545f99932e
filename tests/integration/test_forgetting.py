"""Two routers and their Redis, as processes that stop and go on: what is erased is forgotten, and nobody hangs."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import pytest_asyncio
from redis.asyncio import Redis

from common.bearer import credentials
from common.topology import Topology
from memshard.admin.v1 import cluster_pb2, cluster_pb2_grpc
from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from router.listening import LEASE_S
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, is_ambiguous, memory_service, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@dataclass(frozen=True)
class Pair:
    """A cluster with two routers."""

    cluster: LocalCluster
    topology: Topology
    one: "MemoryServiceAsyncStub"
    other: "MemoryServiceAsyncStub"
    redis: Redis

    async def location(self, memory_id: str) -> bytes | None:
        """What Redis knows of a memory."""
        found: Any = await self.redis.get(f"loc:{memory_id}")
        return None if found is None else bytes(found)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def two_routers() -> AsyncIterator[Pair]:
    async with LocalCluster(shards=2, routers=2) as cluster:
        host, port = cluster.address.split(":")
        redis = Redis.from_url(cluster.redis_url())
        async with memory_service(cluster.address) as one, memory_service(f"{host}:{int(port) + 1}") as other:
            topology = await topology_of(cluster.catalog_dsn())
            yield Pair(cluster, topology, one, other, redis)
        await redis.aclose()


@pytest_asyncio.fixture(loop_scope="session")
async def pair(two_routers: Pair) -> Pair:
    """When the routers have got over what a test before did to them."""
    await eventually(lambda: _all_write(two_routers), within_s=20)
    return two_routers


async def _all_listen(redis: Redis, routers: int) -> bool:
    channels = await redis.pubsub_channels("memshard:*")
    return bool(channels) and (await redis.pubsub_numsub(*channels))[0][1] == routers


async def _all_write(pair: Pair) -> bool:
    """Whether both routers write to Redis where memories are, and so have heard how things are there."""
    for router in (pair.one, pair.other):
        stored = await router.StoreMemory(store_request(f"user-{uuid.uuid4()}", "remembered"))
        if await pair.location(stored.memory.id) is None:
            return False
    return True


@contextmanager
def stopped(pair: Pair, name: str) -> Iterator[None]:
    """The process does nothing meanwhile."""
    pid = pair.cluster.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def pass_by(seconds: float) -> None:
    """For so long; there is nothing to look at."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    await eventually(lambda: loop.time() > until, within_s=seconds + 1)


async def test_a_router_that_was_held_up_hears_the_others_again_and_leaves_when_it_is_told_to(pair: Pair) -> None:
    """redis-py runs on asyncio.wait_for, which can swallow a cancellation."""
    for _ in range(3):
        with stopped(pair, "router-1"):
            await pass_by(LEASE_S * 2)
        await eventually(lambda: _all_listen(pair.redis, 2), within_s=10)
    # It hears: an erasure need not wait for the end of its lease.
    loop = asyncio.get_running_loop()

    async def confirmed_soon() -> bool:
        user, began = f"user-{uuid.uuid4()}", loop.time()
        await pair.one.StoreMemory(store_request(user, "erased"))
        await pair.one.EraseUser(pb.EraseUserRequest(user_id=user))
        return loop.time() - began < LEASE_S / 2

    await eventually(confirmed_soon)
    process = psutil.Process(pair.cluster.kill("router-1", signal.SIGTERM))
    await eventually(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, within_s=10)
    await eventually(pair.cluster.healthy, within_s=20)
    await eventually(lambda: _all_write(pair))


async def hot_users(pair: Pair, router: str) -> set[str]:
    """Whom a router names as those it is asked about most."""
    token = credentials(pair.cluster.layout.admin_token.read_text().strip())
    address = f"127.0.0.1:{pair.cluster.plan().record.ports[f'{router}-admin']}"
    async with grpc.aio.insecure_channel(address) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        named = await stub.GetHotUsers(cluster_pb2.GetHotUsersRequest(most=100, names=True), metadata=token)
    return {found.user for found in named.users}


@pytest.mark.parametrize("memories", [0, 1])
async def test_who_is_erased_is_on_no_routers_list_of_hot_users(pair: Pair, user: str, memories: int) -> None:
    """Nor is a user who was only ever asked about."""
    for _ in range(memories):
        await pair.one.StoreMemory(store_request(user, "erased"))
    for router in (pair.one, pair.other):
        for _ in range(20):
            await router.ListMemories(pb.ListMemoriesRequest(user_id=user))
            await router.ListMemories(pb.ListMemoriesRequest(user_id=f"{user} who stays"))
    for name in ("router-0", "router-1"):
        assert user in await hot_users(pair, name)
    await pair.one.EraseUser(pb.EraseUserRequest(user_id=user))

    async def forgotten() -> bool:
        return user not in {*await hot_users(pair, "router-0"), *await hot_users(pair, "router-1")}

    if memories:
        # It has returned when every router has confirmed that.
        assert await forgotten()
    await eventually(forgotten)
    for name in ("router-0", "router-1"):
        assert f"{user} who stays" in await hot_users(pair, name)


async def test_a_redis_that_hangs_costs_a_store_next_to_nothing(pair: Pair, user: str) -> None:
    """Not even one whose id the other routers are to be told of."""
    with stopped(pair, "redis"):
        for n in range(4):
            request = store_request(user, f"memory {n}", str(uuid.uuid4()))

            async def is_stored(request: pb.StoreMemoryRequest = request) -> bool:
                return bool((await pair.one.StoreMemory(request, timeout=1)).memory.id)

            # Again, as a machine that stands still takes a second too; whoever waited for Redis would never be done.
            await eventually(is_stored)
        batch = [pb.Memory(id=str(uuid.uuid4()), user_id=user, content=f"item {n}") for n in range(4)]

        async def all_are_stored() -> bool:
            answer = await pair.one.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=batch), timeout=1)
            return len(answer.results) == len(batch) and all(result.id for result in answer.results)

        await eventually(all_are_stored)


async def test_an_erasure_that_one_router_could_not_confirm_is_settled_by_another(pair: Pair, user: str) -> None:
    """By the same request as well as by one without a request id, which is made anew each time."""
    stored: list[pb.Memory] = []

    async def is_stored_with_its_place() -> bool:
        """Not, when Redis took too long for that."""
        stored.append((await pair.one.StoreMemory(store_request(user, "of mine"))).memory)
        return await pair.location(stored[-1].id) is not None

    for _ in range(3):
        await eventually(is_stored_with_its_place)
    for memory in stored:
        await pair.other.GetMemory(pb.GetMemoryRequest(id=memory.id))
    erase = pb.EraseUserRequest(user_id=user, request_id="erase")
    with ExitStack() as held:
        with stopped(pair, "redis"):
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError) as unconfirmed:
                    await pair.one.EraseUser(erase, timeout=8)
                assert reason_of(unconfirmed.value) == "ERASE_UNCONFIRMED"
            with pytest.raises(grpc.aio.AioRpcError) as unconfirmed:
                await pair.other.EraseUser(pb.EraseUserRequest(user_id=user), timeout=8)
            assert reason_of(unconfirmed.value) == "ERASE_UNCONFIRMED"
            held.enter_context(stopped(pair, "router-0"))

        async def settled() -> pb.EraseUserResponse:
            return await pair.other.EraseUser(erase, timeout=8)

        erased = await eventually(settled, within_s=20)
        assert erased.memories_erased == len(stored)
        assert not [memory for memory in stored if await pair.location(memory.id)]
    shard = pair.topology.owner(user_slot(user))
    async with database(pair.cluster.shard_dsn(shard.shard_id)) as connection:
        left = "SELECT count(*) FROM erased_ids WHERE id = ANY ($1::uuid[])"
        assert not await connection.fetchval(left, [memory.id for memory in stored])


async def test_a_store_that_an_erasure_overtakes_leaves_no_location_behind(pair: Pair, user: str) -> None:
    """The store commits; its router is held up; the user is erased; and then the router goes on."""
    memory_id = new_id()
    shard = pair.topology.owner(user_slot(user))
    async with database(pair.cluster.shard_dsn(shard.shard_id, owner=True)) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("UPDATE owned_slots SET held = true WHERE slot = $1", user_slot(user))
        store = asyncio.ensure_future(pair.one.StoreMemory(store_request(user, "overtaken", memory_id), timeout=20))
        async with database(pair.cluster.shard_dsn(shard.shard_id)) as other:
            await eventually(lambda: other.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
            with stopped(pair, "router-0"):
                await transaction.rollback()
                await eventually(lambda: other.fetchval("SELECT count(*) = 1 FROM memories WHERE user_id = $1", user))
                erased = await pair.other.EraseUser(pb.EraseUserRequest(user_id=user), timeout=8)
                assert erased.memories_erased == 1
    assert (await store).memory.id == memory_id
    assert await pair.location(memory_id) is None
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await pair.one.GetMemory(pb.GetMemoryRequest(id=memory_id))
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("batch", [False, True])
async def test_a_new_id_of_two_users_is_heard_of_by_every_router(pair: Pair, user: str, batch: bool) -> None:
    """One that was made just now is nobody else's, as a rule; that somebody has it all the same, Redis knows."""
    memory_id = new_id()
    users = [f"{user}-{n}" for n in range(2)]
    await pair.one.StoreMemory(store_request(users[0], "mine", memory_id))
    got = await pair.one.GetMemory(pb.GetMemoryRequest(id=memory_id))
    assert got.memory.user_id == users[0]
    second = store_request(users[1], "mine too", memory_id)
    if batch:
        await pair.other.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=[second.memory]))
    else:
        await pair.other.StoreMemory(second)

    # A router that Redis did not answer in time goes by its own memory for ten seconds.
    await eventually(lambda: is_ambiguous(pair.one, memory_id), within_s=20)
