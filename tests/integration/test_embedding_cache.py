"""Embeddings in a router's memory and in a Redis of the tests' own: whose they are, and what becomes of them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from common.config import RouterSettings
from common.deadline import Deadline
from common.embedder import HttpEmbedder
from memshard.v1 import memory_pb2 as pb
from router.embed import Embedding
from router.embeddings import EmbeddingCache, Text
from router.envelope import Envelopes
from router.location import era_key
from router.redis_cache import RedisCache
from tests.support.embedding_server import DIMENSIONS, EmbeddingServer, embedding_of
from tests.support.eventually import eventually
from tests.support.own_redis import OwnRedis

CLUSTER = "cluster"
KEY = b"k" * 32
ERA = b"era"
WEEK_MS = 7 * 86400 * 1000
QUERY = Text("green tea")
STORED = Text("green tea", "alice")


@asynccontextmanager
async def router(
    url: str, *, cluster_id: str = CLUSTER, key: bytes = KEY, model: str = "words", dimensions: int = DIMENSIONS
) -> AsyncIterator[EmbeddingCache]:
    """What a router has of all this."""
    settings = RouterSettings(catalog_dsn="postgresql://unused", redis_url=url, redis_timeout_s=1)  # type: ignore[arg-type]
    link = RedisCache(settings)
    cache = EmbeddingCache(settings, link, Envelopes(key), cluster_id, model, dimensions)
    cache.hear_era(ERA)
    try:
        yield cache
    finally:
        await cache.close()
        await link.close()


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


async def keep(cache: EmbeddingCache, *texts: Text, era: bytes = ERA) -> None:
    """Keeps what a model says of them, to the end."""
    cache.keep_soon(texts, [embedding_of(text.text) for text in texts], era)
    await asyncio.gather(*cache._keeping)


async def has(cache: EmbeddingCache, *texts: Text) -> list[bool]:
    """Which of them it has, as the model says."""
    found = await cache.find(texts)
    for text, vector in zip(texts, found, strict=True):
        assert vector is None or vector == pytest.approx(embedding_of(text.text))
    return [vector is not None for vector in found]


async def test_a_query_that_one_router_embedded_another_need_not(own_redis: OwnRedis, redis: Redis) -> None:
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        assert await has(other, QUERY) == [False]
        await keep(one, QUERY)
        assert await has(other, QUERY, Text("black tea")) == [True, False]
        (name,) = [name async for name in redis.scan_iter("query:*")]
        assert 0 < await redis.pttl(name) <= WEEK_MS
        await redis.flushall()
        assert await has(other, QUERY) == await has(one, QUERY) == [True]
        assert other.flush() == 1
        assert await has(other, QUERY) == [False]


async def test_what_a_user_stored_is_that_users_and_goes_with_the_user(own_redis: OwnRedis, redis: Redis) -> None:
    bob = Text(STORED.text, "bob")
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        await keep(one, STORED, Text("black coffee", "alice"))
        assert await has(other, STORED, bob, QUERY) == [True, False, False]
        await keep(one, bob)
        (name, _) = [name async for name in redis.scan_iter("emb:*")]
        left_ms = await redis.pttl(name)
        assert 0 < left_ms <= WEEK_MS
        await other.drop(redis, "alice")
        assert await has(one, STORED, Text("black coffee", "alice"), bob) == [False, False, True]
        # What was made before the erasure comes too late.
        await redis.set(era_key(CLUSTER), b"next")
        await keep(one, STORED)
        assert await has(one, STORED) == [False]
        await keep(one, STORED, era=b"next")
        assert await has(one, STORED) == [True]


async def test_nothing_of_a_user_is_there_for_longer_than_a_week(own_redis: OwnRedis, redis: Redis) -> None:
    async with router(own_redis.url) as one:
        await keep(one, STORED)
        (name,) = [name async for name in redis.scan_iter("emb:*")]
        await redis.pexpire(name, 60_000)
        await keep(one, Text("black coffee", "alice"))
        assert await redis.hlen(name) == 2
        assert 0 < await redis.pttl(name) <= 60_000


async def test_a_user_with_very_many_texts_begins_anew(own_redis: OwnRedis, redis: Redis) -> None:
    async with router(own_redis.url) as one:
        for first in range(0, 1000, 300):
            await keep(one, *(Text(f"text {first + number}", "alice") for number in range(300)))
        (name,) = [name async for name in redis.scan_iter("emb:*")]
        assert await redis.hlen(name) <= 500
        assert await has(one, Text("text 1199", "alice"), Text("text 0", "alice")) == [True, False]


@pytest.mark.parametrize(
    "different", [{"cluster_id": "another"}, {"key": b"x" * 32}, {"model": "newer"}, {"dimensions": DIMENSIONS + 1}]
)
async def test_another_clusters_or_models_is_nothing(
    own_redis: OwnRedis, redis: Redis, different: dict[str, Any]
) -> None:
    async with router(own_redis.url) as one, router(own_redis.url, **different) as other:
        await keep(one, QUERY, STORED)
        assert await has(other, QUERY, STORED) == [False, False]


async def test_garbage_is_nothing(own_redis: OwnRedis, redis: Redis) -> None:
    async with router(own_redis.url) as one, router(own_redis.url) as other:
        await keep(one, QUERY, STORED, Text("black tea"))
        names = [name async for name in redis.scan_iter("query:*")]
        texts: Any = await redis.mget(names)
        # Each has the other's.
        await redis.mset(dict(zip(names, reversed(texts), strict=True)))
        (of_user,) = [name async for name in redis.scan_iter("emb:*")]
        for field in await redis.hkeys(of_user):
            await redis.hset(of_user, field, b"M1" + b"garbage" * 10)
        assert await has(other, QUERY, Text("black tea"), STORED) == [False] * 3
        await redis.delete(of_user, *names)
        await redis.set(of_user, "no hash")
        await redis.hset(names[0], "no", "text")
        assert await has(other, QUERY, Text("black tea"), STORED) == [False] * 3


async def test_without_redis_a_router_remembers_queries_alone(own_redis: OwnRedis, redis: Redis) -> None:
    async with router(own_redis.url) as one:
        await own_redis.kill()
        await keep(one, QUERY, STORED)
        assert await has(one, QUERY, STORED) == [True, False]


async def test_the_model_is_asked_once_for_each_text_and_not_needed_for_what_it_made(
    own_redis: OwnRedis, redis: Redis
) -> None:
    with EmbeddingServer() as server:
        settings = RouterSettings(catalog_dsn="postgresql://unused", embedder="http", embedder_url=server.url)  # type: ignore[arg-type]
        embedder = HttpEmbedder(settings, "words", DIMENSIONS)
        async with router(own_redis.url) as cache:
            embedding = Embedding(embedder, cache)

            async def made(contents: Sequence[str]) -> list[Any]:
                memories = [pb.Memory(user_id="alice", content=content) for content in contents]
                return await embedding.of_memories(memories, [""] * len(memories), Deadline.after(5))

            first = await made(["green tea", "black coffee"])
            await eventually(lambda: _is_there(cache, "black coffee"))
            # The middle one is new; each has its own.
            again = await made(["black coffee", "red wine", "green tea"])
            assert again[0] == pytest.approx(first[1])
            assert again[2] == pytest.approx(first[0])
            assert server.texts == ["green tea", "black coffee", "red wine"]
            query = await embedding.of_query("green tea", Deadline.after(5))
            server.down = True
            assert await embedding.of_query("green tea", Deadline.after(5)) == pytest.approx(query)
            assert server.texts[3:] == ["green tea"]
        await embedder.close()


async def _is_there(cache: EmbeddingCache, content: str) -> bool:
    (vector,) = await cache.find([Text(content, "alice")])
    return vector is not None
