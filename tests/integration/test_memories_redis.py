"""Memories in a Redis of the tests' own, between two routers: what is found there was written for it, or is nothing."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from common.config import RouterSettings
from common.slots import SLOT_COUNT
from common.telemetry.registry import REGISTRY
from common.topology import Shard, SlotRange, Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import EVENTUAL, Position
from router.envelope import Envelopes
from router.location import era_key
from router.memories import Kept, MemoryCache, Question
from router.memories_redis import MemoryRedis
from router.redis_cache import RedisCache
from router.stamps import Stamp
from tests.support.eventually import eventually
from tests.support.own_redis import OwnRedis
from tests.support.spans import Spans, recording
from tests.support.swallowed import Swallowed
from tests.unit.router.scripted import CLUSTER_ID
from tests.unit.router.test_gets import getting

CLUSTER = "cluster"
KEY = b"k" * 32
ERA = b"era"
TTL_S = 3600


@dataclass
class Router:
    """What a router has of all this."""

    first: MemoryCache
    shared: MemoryRedis
    envelopes: Envelopes
    writing: "asyncio.Task[None]"

    def keep(self, question: Question, lsn: int, content: str = "tea", *, age_ms: int = 0, era: bytes = ERA) -> None:
        memory = pb.Memory(
            id=question.memory_id, user_id=question.user_id, content=content, embedding_state=pb.EMBEDDING_STATE_READY
        )
        encoded = pb.GetMemoryResponse(memory=memory).SerializeToString()
        said = shard_pb2.ReadStamp(timeline=1, lsn=lsn, age_ms=age_ms)
        stamp = Stamp.of_answer("shard-0", said, self.first.now())
        self.shared.keep_soon(question, Kept(question.user_id, 7, encoded, stamp), memory, era)

    async def find(self, question: Question) -> tuple[Kept, pb.Memory] | None:
        """What it finds, however fresh that is."""
        return await self.shared.find(question, lambda _: True)

    async def has(self, question: Question) -> tuple[str, int] | None:
        """The content that it finds, and the place in the log that it is of."""
        found = await self.find(question)
        if found is None:
            return None
        kept, memory = found
        assert pb.GetMemoryResponse.FromString(kept.encoded).memory == memory
        assert (kept.user_id, kept.slot, kept.stamp.shard_id) == (question.user_id, 7, "shard-0")
        return memory.content, kept.stamp.position.lsn

    def name_of(self, question: Question) -> str:
        return f"mem:{self.envelopes.digest(CLUSTER, *question[:2])}:{int(question.include_embedding)}"


@asynccontextmanager
async def router(
    url: str, cluster_id: str = CLUSTER, key: bytes = KEY, redis_timeout_s: float = 1.0
) -> AsyncIterator[Router]:
    settings = RouterSettings(
        catalog_dsn="postgresql://unused",  # type: ignore[arg-type]
        redis_url=url,  # type: ignore[arg-type]
        redis_timeout_s=redis_timeout_s,
    )
    async with AsyncExitStack() as stack:
        link = RedisCache(settings)
        stack.push_async_callback(link.close)
        first, envelopes = MemoryCache(settings, lambda: True), Envelopes(key)
        shared = MemoryRedis(settings, link, envelopes, cluster_id, first)
        shared.hear_era(ERA)
        writing = asyncio.create_task(shared.run())
        try:
            yield Router(first, shared, envelopes, writing)
        finally:
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing


@pytest_asyncio.fixture
async def own_redis() -> AsyncIterator[OwnRedis]:
    server = OwnRedis()
    await server.start()
    yield server
    await server.kill()


@pytest_asyncio.fixture
async def redis(own_redis: OwnRedis) -> AsyncIterator[Redis]:
    client = Redis.from_url(own_redis.url)
    await client.set(era_key(CLUSTER), ERA)
    yield client
    await client.aclose()


@pytest.fixture
def question(user: str) -> Question:
    return Question(user, str(uuid.uuid4()), include_embedding=False)


async def _has(router: Router, question: Question, expected: tuple[str, int] | None) -> bool:
    return await router.has(question) == expected


async def test_what_one_router_read_another_finds(own_redis: OwnRedis, redis: Redis, question: Question) -> None:
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        assert await other.has(question) is None
        one.keep(question, 100, "tea " * 1000, age_ms=700)
        await eventually(lambda: _has(other, question, ("tea " * 1000, 100)))
        found = await other.find(question)
        assert found is not None
        age_s = other.first.now() - found[0].stamp.fresh_at
        assert 0.7 <= age_s < 5
        # It goes by what Redis says is left of it.
        name = one.name_of(question)
        assert 0 < await redis.pttl(name) <= TTL_S * 1000
        assert await redis.strlen(name) < 1000
        await redis.pexpire(name, TTL_S * 1000 - 60_000)
        found = await other.find(question)
        assert found is not None
        assert 60.7 <= other.first.now() - found[0].stamp.fresh_at < 66
        await redis.persist(name)
        assert await other.has(question) is None


async def test_what_will_not_do_is_no_hit(own_redis: OwnRedis, redis: Redis, question: Question) -> None:
    def looked(result: str) -> float:
        labels = {"layer": "memories_redis", "result": result}
        return REGISTRY.get_sample_value("memory_cache_requests_total", labels) or 0.0

    async with router(own_redis.url) as one:
        one.keep(question, 100)
        await eventually(lambda: _has(one, question, ("tea", 100)))
        hits, misses = looked("hit"), looked("miss")

        async def look_for(lsn: int) -> bool:
            with recording() as spans, spans.call():
                found = await one.shared.find(question, lambda kept: kept.stamp.position.lsn >= lsn)
            ((_, look),) = [trace.spans for trace in spans.kept]
            assert look.attributes == {
                "memshard.cache.layer": "memories_redis",
                "memshard.cache.hit": found is not None,
            }
            return found is not None

        assert [await look_for(lsn) for lsn in (101, 100)] == [False, True]
        assert (looked("hit") - hits, looked("miss") - misses) == (1, 1)


async def test_a_call_that_redis_answers_is_a_hit_also_of_who_waits_for_it(own_redis: OwnRedis, redis: Redis) -> None:
    await redis.set(era_key(CLUSTER_ID), ERA)
    async with (
        getting(redis_url=own_redis.url, redis_timeout_s=1) as one,
        getting(redis_url=own_redis.url, redis_timeout_s=1) as other,
    ):
        one.parts.memories_redis.hear_era(ERA)
        writing = asyncio.create_task(one.parts.memories_redis.run())
        assert await one.get(EVENTUAL) == ("user-1", "primary")
        await eventually(lambda: redis.keys("mem:*"))
        writing.cancel()
        await asyncio.wait([writing])
        hits = []

        async def get(spans: Spans) -> None:
            with spans.call() as root:
                assert await other.get(EVENTUAL) == ("user-1", "cache")
                hits.append(root.attributes["memshard.cache.hit"])

        with recording() as spans:
            await asyncio.gather(get(spans), get(spans))
        assert hits == [True, True]
        looks = [name for names in spans.names() for name in names if name == "look into Redis"]
        assert looks == ["look into Redis"]
        assert other.primary.answered == 0


async def test_nobody_finds_what_is_anothers(own_redis: OwnRedis, redis: Redis, question: Question) -> None:
    async with (
        router(own_redis.url) as one,
        router(own_redis.url, "another") as elsewhere,
        router(own_redis.url, key=b"o" * 32) as stranger,
    ):
        one.keep(question, 100)
        await eventually(lambda: _has(one, question, ("tea", 100)))
        assert await elsewhere.has(question) is None
        assert await stranger.has(question) is None
        entry: Any = await redis.get(one.name_of(question))
        for other in (
            question._replace(user_id=question.user_id + "x"),
            question._replace(memory_id=str(uuid.uuid4())),
            question._replace(include_embedding=True),
        ):
            assert await one.has(other) is None
            # Nor when somebody puts it where theirs would be.
            await redis.set(one.name_of(other), entry, px=TTL_S * 1000)
            assert await one.has(other) is None
        await redis.set(elsewhere.name_of(question), entry, px=TTL_S * 1000)
        assert await elsewhere.has(question) is None


@pytest.mark.parametrize("garbage", ["text", "cut", "changed", "list", "hash", "marker", "empty"])
async def test_garbage_is_nothing_and_is_written_over(
    own_redis: OwnRedis, redis: Redis, question: Question, garbage: str
) -> None:
    async with router(own_redis.url) as one:
        one.keep(question, 100)
        await eventually(lambda: _has(one, question, ("tea", 100)))
        name = one.name_of(question)
        entry: Any = await redis.get(name)
        await redis.delete(name)
        if garbage == "list":
            await redis.lpush(name, entry)
        elif garbage == "hash":
            await redis.hset(name, "field", entry)
        else:
            found = {
                "text": b"\x80\x04K\x01.",  # A pickle.
                "cut": entry[:-1],
                "changed": entry[:-1] + bytes([entry[-1] ^ 1]),
                "marker": b"X1" + b"0" * 24 + b"shard-0\n",
                "empty": b"",
            }
            await redis.set(name, found[garbage], px=TTL_S * 1000)
        assert await one.has(question) is None
        one.keep(question, 101, "coffee")
        await eventually(lambda: _has(one, question, ("coffee", 101)))


async def test_what_is_of_an_earlier_state_does_not_take_the_place_of_a_later(
    own_redis: OwnRedis, redis: Redis, question: Question
) -> None:
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        one.keep(question, 200, "coffee")
        await eventually(lambda: _has(one, question, ("coffee", 200)))
        other.keep(question, 100, "tea")
        await _written(other, redis)
        assert await one.has(question) == ("coffee", 200)
        other.keep(question, 1 << 40, "water")
        await eventually(lambda: _has(one, question, ("water", 1 << 40)))


async def _written(router: Router, redis: Redis) -> None:
    """Returns once everything has been written that waited before."""
    last = Question("nobody", str(uuid.uuid4()), include_embedding=False)
    router.keep(last, 1)
    await eventually(lambda: redis.exists(router.name_of(last)))


async def test_what_was_read_before_a_change_is_not_written_after_it(
    own_redis: OwnRedis, redis: Redis, question: Question
) -> None:
    """By another router, which has not heard of the change."""
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        one.keep(question, 100, "tea")
        await eventually(lambda: _has(other, question, ("tea", 100)))
        one.shared.mark_soon(question.user_id, question.memory_id, "shard-0", Position(1, 150))
        await eventually(lambda: _has(other, question, None))
        other.keep(question, 149, "tea")
        await _written(other, redis)
        assert await other.has(question) is None
        other.keep(question, 150, "coffee")
        await eventually(lambda: _has(one, question, ("coffee", 150)))
        # A change that nobody knows the place of keeps everything away.
        one.shared.mark_soon(question.user_id, question.memory_id, "")
        await eventually(lambda: _has(other, question, None))
        other.keep(question, 10_000, "tea")
        await _written(other, redis)
        assert await other.has(question) is None
        assert 0 < await redis.pttl(one.name_of(question)) <= 60_000


async def test_a_marker_that_comes_late_leaves_what_is_of_a_later_state(
    own_redis: OwnRedis, redis: Redis, question: Question
) -> None:
    async with router(own_redis.url) as one:
        one.keep(question, 200, "coffee")
        await eventually(lambda: _has(one, question, ("coffee", 200)))
        one.shared.mark_soon(question.user_id, question.memory_id, "shard-0", Position(1, 150))
        await _written(one, redis)
        assert await one.has(question) == ("coffee", 200)


@pytest.mark.parametrize("late_ms", [0, 50, 600])
async def test_what_lay_in_a_buffer_while_redis_stood_still_is_as_old_as_it_is(
    own_redis: OwnRedis, redis: Redis, question: Question, late_ms: int
) -> None:
    async with router(own_redis.url, redis_timeout_s=10) as one:
        if late_ms:
            await redis.client_pause(late_ms, all=False)
        one.keep(question, 100)
        read_at = one.first.now()
        await eventually(lambda: _has(one, question, ("tea", 100)))
        found = await one.find(question)
        assert found is not None
        # Redis counts whole milliseconds.
        assert found[0].stamp.fresh_at <= read_at + 0.002


async def test_what_was_under_way_for_long_is_not_written_but_for_markers(
    own_redis: OwnRedis, redis: Redis, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = question._replace(memory_id=str(uuid.uuid4()))
    async with router(own_redis.url) as one:
        one.keep(changed, 100)
        await eventually(lambda: _has(one, changed, ("tea", 100)))

        async def long_ago() -> int:
            return int((time.time() - 1.5) * 1000)

        with monkeypatch.context() as patched:
            patched.setattr(one.shared, "_redis_now_ms", long_ago)
            one.keep(question, 100)
            one.shared.mark_soon(changed.user_id, changed.memory_id, "shard-0", Position(1, 150))
            await eventually(lambda: _has(one, changed, None))
        await _written(one, redis)
        assert await one.has(question) is None
        one.keep(question, 100)
        await eventually(lambda: _has(one, question, ("tea", 100)))


async def test_what_began_before_an_erasure_is_not_written_after_it(
    own_redis: OwnRedis, redis: Redis, question: Question
) -> None:
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        for with_embedding in (False, True):
            one.keep(question._replace(include_embedding=with_embedding), 100)
        await eventually(lambda: _has(one, question._replace(include_embedding=True), ("tea", 100)))
        await redis.set(era_key(CLUSTER), b"the next")
        await one.shared.drop(redis, question.user_id, [question.memory_id])
        assert not await redis.keys("mem:*")
        for era in (ERA, b""):
            other.keep(question, 300, era=era)
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.3
        await eventually(lambda: loop.time() > until)
        assert not await redis.keys("mem:*")
        other.keep(question, 300, "anew", era=b"the next")
        await eventually(lambda: _has(one, question, ("anew", 300)))


async def test_what_this_router_was_told_to_forget_is_not_written(
    own_redis: OwnRedis, redis: Redis, question: Question
) -> None:
    async with router(own_redis.url) as one:
        one.keep(question, 100)
        one.first.drop([question.memory_id])
        await _written(one, redis)
        assert await one.has(question) is None


async def test_who_begins_to_listen_uses_nothing_that_was_left_before(
    own_redis: OwnRedis, redis: Redis, question: Question
) -> None:
    """Redis may have been put back since to what it had before an erasure."""
    topology = Topology(CLUSTER, 1, (Shard("shard-0", "a:1"),), (SlotRange(0, SLOT_COUNT - 1, "shard-0"),))
    async with router(own_redis.url) as one, router(own_redis.url) as other:

        async def has(content: str) -> bool:
            found = await other.shared.find(
                question, lambda kept: other.first.may_answer(kept, question, EVENTUAL, topology)
            )
            return found is not None and found[1].content == content

        one.keep(question, 100)
        await eventually(lambda: has("tea"))
        other.first.clear()
        assert not await has("tea")
        assert await one.has(question) == ("tea", 100)

        async def read_anew() -> bool:
            # Whole milliseconds of age are counted up: what is read in the one after `clear` counts as of before it.
            one.keep(question, 101, "coffee")
            return await has("coffee")

        await eventually(read_anew)


async def test_writing_ends_when_it_is_told_to_though_redis_client_has_swallowed_that(
    own_redis: OwnRedis, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncio.wait_for of Python 3.11 does with a cancellation that comes together with a result."""
    async with router(own_redis.url) as one:
        writes = Swallowed()
        monkeypatch.setattr(RedisCache, "ask", writes)
        one.keep(question, 100)
        await writes.has_begun.wait()
        one.writing.cancel()
        await eventually(one.writing.done)


async def test_a_dead_redis_is_nothing_found_and_nobody_waits(own_redis: OwnRedis, question: Question) -> None:
    async with router(own_redis.url) as one:
        await own_redis.kill()
        began = time.monotonic()
        for n in range(300):
            one.keep(question._replace(memory_id=str(uuid.uuid4())), n)
            one.shared.mark_soon(question.user_id, question.memory_id, "shard-0")
        for _ in range(20):
            assert await one.has(question) is None
        assert time.monotonic() - began < 5


async def test_many_that_look_at_once_find_each_their_own(own_redis: OwnRedis, redis: Redis, user: str) -> None:
    async with router(own_redis.url) as one:
        questions = [Question(user, str(uuid.uuid4()), include_embedding=False) for _ in range(200)]
        for number, question in enumerate(questions):
            one.keep(question, number + 1, f"memory {number}")
        await eventually(lambda: _has(one, questions[-1], ("memory 199", 200)))
        found = await asyncio.gather(*map(one.has, questions))
        assert found == [(f"memory {number}", number + 1) for number in range(200)]
