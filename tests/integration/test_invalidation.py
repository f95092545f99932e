"""Routers that tell each other what to forget, through a Redis of the tests' own that can be cut off and killed."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import Unavailable
from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from router.invalidation import Invalidations
from router.listening import LEASE_S
from router.location import NOWHERE, LocationCache
from tests.support.cluster import PATIENT_WITH_REDIS, LocalCluster
from tests.support.eventually import eventually
from tests.support.own_redis import OwnRedis
from tests.support.proxy import Proxy
from tests.support.swallowed import Swallowed
from tests.support.wire import is_ambiguous, memory_service, store_request

IDS = [str(uuid.uuid4()) for _ in range(2500)]
HERE = frozenset({7})


@pytest_asyncio.fixture
async def own_redis() -> AsyncIterator[OwnRedis]:
    server = OwnRedis()
    await server.start()
    yield server
    await server.kill()


@dataclass
class Router:
    """What a router has of all this."""

    locations: LocationCache
    invalidations: Invalidations

    async def remembers(self, memory_id: str) -> bool:
        """Whether it finds the id without Redis, which has been emptied."""
        return await self.locations.find(memory_id) != NOWHERE


@asynccontextmanager
async def router(url: str) -> AsyncIterator[Router]:
    settings = RouterSettings(
        catalog_dsn="postgresql://unused",  # type: ignore[arg-type]
        redis_url=url,  # type: ignore[arg-type]
        redis_timeout_s=1,
        location_cache_ttl_s=600,
    )
    invalidations = Invalidations(settings, "cluster")
    locations = LocationCache(settings, "cluster", invalidations.alive)
    listening = asyncio.create_task(invalidations.run(locations))
    try:
        await eventually(invalidations.alive)
        yield Router(locations, invalidations)
    finally:
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await locations.close()
        await invalidations.close()


async def empty(url: str) -> None:
    client = Redis.from_url(url)
    await client.flushall()
    await client.aclose()


async def test_what_one_router_forgets_all_have_forgotten_when_it_returns(own_redis: OwnRedis) -> None:
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        for memory_id in (*IDS, "kept"):
            await other.locations.learn(memory_id, HERE, since=other.locations.moment())
        await one.invalidations.forget_everywhere(one.locations, IDS, Deadline.after(10))
        for memory_id in IDS:
            assert await other.locations.find(memory_id) == NOWHERE
        await empty(own_redis.url)
        assert await other.remembers("kept")


async def test_a_router_that_hears_nothing_stops_believing_its_memory(own_redis: OwnRedis) -> None:
    """The erasure does not wait for it for longer than the lease."""
    async with (
        Proxy("127.0.0.1", own_redis.port) as link,
        router(own_redis.url) as one,
        router(f"redis://{link.address}") as other,
    ):
        await other.locations.learn(IDS[0], HERE, since=other.locations.moment())
        await empty(own_redis.url)
        assert await other.remembers(IDS[0])
        link.hold_answers()
        deadline = Deadline.after(LEASE_S * 4)
        await one.invalidations.forget_everywhere(one.locations, IDS[:1], deadline)
        assert deadline.remaining_s() > 0
        assert not await other.remembers(IDS[0])
        link.cut()
        await eventually(other.invalidations.alive)
        assert not await other.remembers(IDS[0])


async def test_a_router_that_redis_has_dropped_unnoticed_is_waited_for(own_redis: OwnRedis) -> None:
    """PUBLISH does not count it any more, and it believes its memory for its lease."""
    async with (
        Proxy("127.0.0.1", own_redis.port) as link,
        router(own_redis.url) as one,
        router(f"redis://{link.address}") as other,
    ):
        client = Redis.from_url(own_redis.url)
        await other.locations.learn(IDS[0], HERE, since=other.locations.moment())
        assert await other.remembers(IDS[0])
        link.hold_answers()
        listeners = sorted(int(known["id"]) for known in await client.client_list(_type="pubsub"))
        await client.client_kill_filter(_id=str(listeners[-1]))
        assert other.invalidations.alive()
        await one.invalidations.forget_everywhere(one.locations, IDS[:1], Deadline.after(10))
        assert not await other.remembers(IDS[0])
        await client.aclose()
        link.cut()


async def test_an_erasure_waits_for_a_router_that_has_left_no_longer_than_its_lease(own_redis: OwnRedis) -> None:
    async with router(own_redis.url) as one, router(own_redis.url):
        async with router(own_redis.url):
            pass
        loop = asyncio.get_running_loop()
        began = loop.time()
        await one.invalidations.forget_everywhere(one.locations, IDS[:1], Deadline.after(10))
        assert loop.time() - began < LEASE_S * 4

        async def confirmed_soon() -> bool:
            began = loop.time()
            await one.invalidations.forget_everywhere(one.locations, IDS[:1], Deadline.after(10))
            return loop.time() - began < LEASE_S / 2

        await eventually(confirmed_soon)


async def test_telling_ends_when_it_is_told_to_though_redis_client_has_swallowed_that(
    own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with router(own_redis.url) as one:
        said = Swallowed()
        monkeypatch.setattr(Invalidations, "_say", said)
        telling = asyncio.create_task(one.invalidations.keep_telling())
        one.invalidations.tell_soon(IDS[:1])
        await said.has_begun.wait()
        telling.cancel()
        await eventually(telling.done)


async def test_without_redis_nothing_is_remembered_and_an_erasure_is_not_confirmed(own_redis: OwnRedis) -> None:
    async with router(own_redis.url) as one:
        await one.locations.learn(IDS[0], HERE, since=one.locations.moment())
        await own_redis.kill()
        await eventually(lambda: not one.invalidations.alive())
        assert not await one.remembers(IDS[0])
        with pytest.raises(Unavailable) as unconfirmed:
            await one.invalidations.forget_everywhere(one.locations, IDS[:1], Deadline.after(5))
        assert unconfirmed.value.reason == "ERASE_UNCONFIRMED"
        await own_redis.start()
        client = Redis.from_url(own_redis.url)
        await client.set(f"loc:{IDS[0]}", "7")
        await eventually(one.invalidations.alive)
        await one.invalidations.forget_everywhere(one.locations, IDS[:1], Deadline.after(5))
        assert await client.get(f"loc:{IDS[0]}") is None
        await client.aclose()


async def test_what_was_learnt_before_an_erasure_is_not_written_after_it(own_redis: OwnRedis) -> None:
    """Not even by a router that has not heard of it yet."""
    async with router(own_redis.url) as one:
        client = Redis.from_url(own_redis.url)
        fresh = new_id()
        before = one.locations.moment()
        assert not await one.locations.add(fresh, 7, since=before)
        assert await client.get(f"loc:{fresh}") == b"7"
        # How an erasure begins.
        await client.set("memshard:era:cluster", str(uuid.uuid4()))
        await one.locations.learn(fresh, HERE, since=before)
        assert await client.get(f"loc:{fresh}") is None
        await one.locations.add_many([(fresh, 7)], since=before)
        assert await client.get(f"loc:{fresh}") is None
        # It knows of the new era soon.
        await eventually(lambda: _is_written(one, client))
        before = one.locations.moment()
        await one.invalidations.forget_everywhere(one.locations, [fresh], Deadline.after(5))
        await one.locations.add(fresh, 7, since=before)
        assert await one.locations.find(fresh) == NOWHERE
        await client.aclose()


async def _is_written(by: Router, client: Redis) -> bool:
    fresh = new_id()
    await by.locations.add(fresh, 7, since=by.locations.moment())
    return await client.get(f"loc:{fresh}") == b"7"


async def test_a_router_that_hears_nothing_writes_nothing(own_redis: OwnRedis) -> None:
    async with router(own_redis.url) as one:
        client = Redis.from_url(own_redis.url)
        fresh = new_id()
        one.locations.clear()
        await one.locations.add(fresh, 7, since=one.locations.moment())
        assert await client.get(f"loc:{fresh}") is None
        await client.aclose()


async def test_an_answer_from_before_a_forgetting_is_not_remembered_after_it(own_redis: OwnRedis) -> None:
    async with router(own_redis.url) as one:
        began = one.locations.moment()
        await one.invalidations.forget_everywhere(one.locations, IDS[:1], Deadline.after(5))
        await one.locations.learn(IDS[0], HERE, since=began)
        assert await one.locations.find(IDS[0]) == NOWHERE


async def test_a_second_user_of_an_id_is_heard_of_by_every_router() -> None:
    """One router knows the id as the first user's; the second user stores it through the other router."""
    async with LocalCluster(shards=2, routers=2, environment=PATIENT_WITH_REDIS) as cluster:
        host, port = cluster.address.split(":")
        async with memory_service(cluster.address) as one, memory_service(f"{host}:{int(port) + 1}") as other:
            memory_id = "01900000-0000-7000-8000-000000000001"  # A UUIDv7 of 2024.
            await one.StoreMemory(store_request("first", "mine", memory_id))
            await one.GetMemory(pb.GetMemoryRequest(id=memory_id))
            await one.GetMemory(pb.GetMemoryRequest(id=memory_id))
            await other.StoreMemory(store_request("second", "mine too", memory_id))

            await eventually(lambda: is_ambiguous(one, memory_id))
