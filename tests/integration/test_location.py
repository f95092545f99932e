"""Finding a memory by id alone: how many shards are asked, and that Redis is never believed."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from common.breaker import State
from common.breaker_settings import CACHE
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import Ambiguous, NotFound, Unavailable
from common.topology import Shard, Topology
from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from router.dispatch import Dispatch
from router.fanout import Fanout
from router.locate import Locator
from router.location import LocationCache, era_key
from router.reads import Reads
from router.replicas import Replicas
from router.retries import Retries
from router.shards import Q, R, Rpc, Shards
from router.topology_watch import TopologyWatch
from tests.support.cluster import LocalCluster, free_port
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.wire import store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

SHARDS = 3


class CountingShards(Shards):
    """Real calls to real shards, counted."""

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        self.calls: Counter[str] = Counter()

    async def call(self, shard: Shard, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> R:
        self.calls[shard.shard_id] += 1
        return await super().call(shard, rpc, request, deadline)


@dataclass
class Router:
    """The part of a router that finds memories, freshly started: its own memory is empty."""

    locator: Locator
    shards: CountingShards

    async def get(self, memory_id: str) -> pb.Memory:
        located = await self.locator.get(memory_id, Deadline.after(10), include_embedding=False)
        return located.memory

    async def calls_for(self, memory_id: str, expected_user: str) -> int:
        before = self.shards.calls.total()
        assert (await self.get(memory_id)).user_id == expected_user
        return self.shards.calls.total() - before


@asynccontextmanager
async def router(topology: Topology, redis_url: str | None, era: bytes = b"") -> AsyncIterator[Router]:
    settings = RouterSettings(
        catalog_dsn="postgresql://unused",  # type: ignore[arg-type]
        redis_url=redis_url,  # type: ignore[arg-type]
        redis_timeout_s=1,
    )
    async with AsyncExitStack() as stack:
        shards = CountingShards(settings)
        stack.push_async_callback(shards.close)
        locations = LocationCache(settings, topology.cluster_id)
        stack.push_async_callback(locations.close)
        locations.hear_era(era)
        watch = TopologyWatch("postgresql://unused", topology, poll_s=60, changed=shards.follow)
        retries = Retries()
        reads = Reads(shards, Replicas(shards, topology, settings), settings, retries)
        dispatch, fanout = Dispatch(watch, reads, retries), Fanout(watch, reads, retries, concurrency=8)
        yield Router(Locator(locations, dispatch, fanout), shards)


@pytest_asyncio.fixture(scope="session")
async def topology(cluster: LocalCluster) -> Topology:
    return await topology_of(cluster.catalog_dsn())


@pytest_asyncio.fixture
async def redis(cluster: LocalCluster) -> AsyncIterator[Redis]:
    client = Redis.from_url(cluster.redis_url())
    yield client
    await client.aclose()


@pytest_asyncio.fixture
async def era(redis: Redis, topology: Topology) -> bytes:
    """What a router is told that hears the others."""

    async def found() -> Any:
        return await redis.get(era_key(topology.cluster_id))

    return bytes(await eventually(found))


async def _uses_redis(cluster: LocalCluster) -> bool:
    """Whether the cluster's router does at this moment: not while it takes Redis for slow, as after a crowd."""
    families = await families_of(cluster, "router-0")
    states = {s.labels["name"]: s.value for s in families["circuit_breaker_state"].samples}
    believed = [s.value for s in families["memory_cache_believed"].samples]
    return states["Redis"] == 0 and believed == [1]


@pytest_asyncio.fixture
async def memory_id(api: "MemoryServiceAsyncStub", cluster: LocalCluster, user: str) -> str:
    """A memory that was stored while Redis was in use."""

    async def in_use() -> bool:
        if await _uses_redis(cluster):
            return True
        # A breaker closes when calls have shown that it may.
        await api.StoreMemory(store_request(f"{user}-another", "of somebody else"))
        return False

    await eventually(in_use)
    return (await api.StoreMemory(store_request(user, "found by its id"))).memory.id


async def test_a_stored_memory_is_found_with_one_call(
    cluster: LocalCluster, topology: Topology, memory_id: str, user: str
) -> None:
    async with router(topology, cluster.redis_url()) as fresh:
        assert await fresh.calls_for(memory_id, user) == 1


async def test_one_call_on_a_hit_all_shards_on_a_miss_and_one_the_next_time(
    cluster: LocalCluster, topology: Topology, redis: Redis, memory_id: str, user: str, era: bytes
) -> None:
    await redis.delete(f"loc:{memory_id}")
    async with router(topology, cluster.redis_url(), era) as fresh:
        assert await fresh.calls_for(memory_id, user) == SHARDS
        assert await fresh.calls_for(memory_id, user) == 1
    assert await redis.get(f"loc:{memory_id}") == str(user_slot(user)).encode()
    assert 0 < await redis.ttl(f"loc:{memory_id}") <= 86400
    async with router(topology, cluster.redis_url()) as another:
        assert await another.calls_for(memory_id, user) == 1


@pytest.mark.parametrize("entry", ["wrong slot", "garbage", "out of range", "list"])
async def test_a_wrong_entry_costs_a_second_look_never_an_answer(
    cluster: LocalCluster, topology: Topology, redis: Redis, memory_id: str, user: str, entry: str
) -> None:
    key = f"loc:{memory_id}"
    await redis.delete(key)
    if entry == "list":
        await redis.lpush(key, "7")
    else:
        other = (user_slot(user) + 1) % 16384
        entries: dict[str, str | bytes] = {
            "wrong slot": str(other),
            "garbage": b"\xff\x00,,",
            "out of range": "99999",
        }
        await redis.set(key, entries[entry])
    async with router(topology, cluster.redis_url()) as fresh:
        assert await fresh.calls_for(memory_id, user) <= SHARDS + 1
        assert await fresh.calls_for(memory_id, user) == 1


async def test_a_location_of_a_deleted_memory_is_not_found(
    api: "MemoryServiceAsyncStub",
    cluster: LocalCluster,
    topology: Topology,
    redis: Redis,
    memory_id: str,
    user: str,
) -> None:
    async with router(topology, cluster.redis_url()) as fresh:
        await fresh.get(memory_id)
        await api.DeleteMemory(pb.DeleteMemoryRequest(id=memory_id, user_id=user))
        await redis.set(f"loc:{memory_id}", user_slot(user))
        with pytest.raises(NotFound):
            await fresh.get(memory_id)


async def test_a_router_that_is_late_itself_does_not_take_redis_for_slow(
    topology: Topology, cluster: LocalCluster
) -> None:
    settings = RouterSettings(
        catalog_dsn="postgresql://unused",  # type: ignore[arg-type]
        redis_url=cluster.redis_url(),  # type: ignore[arg-type]
        redis_timeout_s=1,
    )
    locations = LocationCache(settings, topology.cluster_id)

    async def much_to_do() -> None:
        while True:
            time.sleep(0.045)  # Work that does not give way.
            await asyncio.sleep(0)

    await locations.find(new_id())
    busy = asyncio.create_task(much_to_do())
    try:
        for _ in range(3 * CACHE.consecutive_failures):
            await locations.find(new_id())
    finally:
        busy.cancel()
        await locations.close()
    assert locations.breaker.state is State.CLOSED


async def test_a_dead_redis_costs_calls_but_no_answer(topology: Topology, memory_id: str, user: str) -> None:
    async with router(topology, f"redis://127.0.0.1:{free_port()}/0") as fresh:
        assert await fresh.calls_for(memory_id, user) == SHARDS
        assert await fresh.calls_for(memory_id, user) == 1  # From the router's own memory.


async def test_a_redis_that_never_answers_costs_its_timeout_once(topology: Topology, memory_id: str, user: str) -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1024):
                pass
        finally:
            writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with router(topology, f"redis://127.0.0.1:{port}/0") as fresh:
        assert await fresh.calls_for(memory_id, user) == SHARDS
        assert await fresh.calls_for(memory_id, user) == 1
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    "reply", [b"-ASK x\r\n", b"%1\r\n*0\r\n+x\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$-7\r\n"]
)
async def test_a_redis_that_speaks_something_else_costs_calls_but_no_answer(
    topology: Topology, memory_id: str, user: str, reply: bytes
) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1024):
                writer.write(reply)
        finally:
            writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with router(topology, f"redis://127.0.0.1:{port}/0") as fresh:
        assert await fresh.calls_for(memory_id, user) == SHARDS
    server.close()
    await server.wait_closed()


async def test_no_redis_at_all_is_fine(topology: Topology, memory_id: str, user: str) -> None:
    async with router(topology, None) as fresh:
        assert await fresh.calls_for(memory_id, user) == SHARDS


async def test_one_id_of_several_users_is_ambiguous_cached_or_not(
    api: "MemoryServiceAsyncStub", cluster: LocalCluster, topology: Topology, redis: Redis, memory_id: str, user: str
) -> None:
    for n in range(3):
        await api.StoreMemory(store_request(f"{user}-{n}", "the same id", memory_id))
    for _ in range(2):
        async with router(topology, cluster.redis_url()) as fresh:
            for _ in range(2):
                with pytest.raises(Ambiguous):
                    await fresh.get(memory_id)
        await redis.delete(f"loc:{memory_id}")


async def test_an_id_that_others_may_have_is_not_cached_by_its_store_alone(
    api: "MemoryServiceAsyncStub", cluster: LocalCluster, topology: Topology, redis: Redis, user: str
) -> None:
    """The entry of the first user's is lost before the second one's store: one slot would hide the other."""
    memory_id = str(uuid.uuid4())
    await api.StoreMemory(store_request(user, "the first", memory_id))
    async with router(topology, cluster.redis_url()) as fresh:
        assert (await fresh.get(memory_id)).user_id == user
    await redis.delete(f"loc:{memory_id}")
    await api.StoreMemory(store_request(f"{user}-2", "the second", memory_id))
    async with router(topology, cluster.redis_url()) as another:
        with pytest.raises(Ambiguous):
            await another.get(memory_id)


async def test_not_found_takes_every_shards_word_for_it(topology: Topology, memory_id: str, user: str) -> None:
    down = topology.owner((user_slot(user) + 8192) % 16384)
    unreachable = replace(
        topology,
        shards=tuple(
            replace(shard, address=f"127.0.0.1:{free_port()}") if shard == down else shard for shard in topology.shards
        ),
    )
    async with router(unreachable, None) as fresh:
        with pytest.raises(Unavailable):
            await fresh.get(str(uuid.uuid4()))
        assert (await fresh.get(memory_id)).user_id == user  # Found elsewhere: an answer all the same.


async def test_places_that_are_written_together_are_each_what_they_were(
    cluster: LocalCluster, topology: Topology, redis: Redis, era: bytes
) -> None:
    async def scripts_run() -> int:
        stats: Any = await redis.info("commandstats")
        return int(stats["cmdstat_evalsha"]["calls"])

    settings = RouterSettings(
        catalog_dsn="postgresql://unused",  # type: ignore[arg-type]
        redis_url=cluster.redis_url(),  # type: ignore[arg-type]
        redis_timeout_s=1,
    )
    async with AsyncExitStack() as stack:
        locations = LocationCache(settings, topology.cluster_id)
        stack.push_async_callback(locations.close)
        locations.hear_era(era)
        ids, old = [new_id() for _ in range(200)], new_id()
        await redis.set(f"loc:{old}", "7")
        await locations.add(new_id(), 1, since=locations.moment())
        before, since = await scripts_run(), locations.moment()
        *told, others = await asyncio.gather(
            *(locations.add(memory_id, number, since=since) for number, memory_id in enumerate(ids)),
            locations.add(old, 9, since=since),
        )
        # One that somebody else has as well is told as that; the others are nobody else's.
        assert (told, others) == ([False] * 200, True)
        assert await redis.mget([f"loc:{memory_id}" for memory_id in ids]) == [b"%d" % n for n in range(200)]
        assert await redis.get(f"loc:{old}") == b"7,9"
        assert await scripts_run() - before < 50
        # What began in another era is not written, whoever it comes together with.
        locations.hear_era(b"another era")
        late = [new_id() for _ in range(3)]
        await asyncio.gather(
            *(locations.add(memory_id, 1, since=locations.moment()) for memory_id in late),
            *(locations.add(memory_id, 2, since=since) for memory_id in ids[:3]),
        )
        assert await redis.mget([f"loc:{memory_id}" for memory_id in late]) == [None] * 3
        assert await redis.get(f"loc:{ids[0]}") is not None
