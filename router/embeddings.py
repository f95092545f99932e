"""The cache of embeddings: what a model made of a text, so that it is not asked for the same text again.

An embedding depends on the model and the text alone, so nothing here is ever stale, and any router may use what another
has left. Names are digests that only the cluster can make (`router.envelope`).

- Of a *query*: in this router's memory, and in Redis under the digest of model and text, whoever asks.
- Of a text that is *stored*: in Redis alone, in one hash for each user, which an erasure removes. None is written there
  that was made before an erasure (the era, as with memories).

It is for embedders that are asked over a network. The local one is quicker than a look into Redis.
"""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from redis.asyncio import Redis

from common.config import RouterSettings
from router.bounded_cache import BoundedCache
from router.cache_layer import CacheLayer
from router.consistency import Position
from router.envelope import Envelopes
from router.location import era_key
from router.redis_cache import SILENCE, RedisCache

Vector = Sequence[float]

# Texts of one user that are remembered. Who has more begins anew: they are seldom stored twice.
_MOST_OF_USER = 500
# Exchanges with Redis by which something is kept, at once; what is more is not kept.
_MOST_KEEPING = 32
# It stands for no place in any log.
_NOWHERE = Position(0, 0)

# KEYS: the era, a user's hash. ARGV: the era, milliseconds, the most fields, then fields and values. The time counts
# from the first text, so that none is there for longer.
_WRITE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if redis.call('HLEN', KEYS[2]) + (#ARGV - 3) / 2 > tonumber(ARGV[3]) then redis.call('DEL', KEYS[2]) end
redis.call('HSET', KEYS[2], unpack(ARGV, 4))
if redis.call('PTTL', KEYS[2]) < 0 then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Text:
    """A text, and the user whose memory it is; nobody's when it is a query's."""

    text: str
    user_id: str = ""


class EmbeddingCache:
    """Embeddings by model and text. No method raises for what Redis does, but `drop`."""

    def __init__(
        self,
        settings: RouterSettings,
        redis: RedisCache,
        envelopes: Envelopes,
        cluster_id: str,
        model: str,
        dimensions: int,
    ) -> None:
        self.layer = CacheLayer("embeddings")
        self.layer_redis = CacheLayer("embeddings_redis")
        self._ttl_s = settings.embedding_cache_ttl_s
        self._queries: BoundedCache[str, bytes] = BoundedCache(settings.embedding_cache_bytes if self._ttl_s else 0)
        self._redis = redis
        self._write = redis.redis.register_script(_WRITE) if redis.redis is not None and self._ttl_s else None
        self._envelopes = envelopes
        self._cluster_id = cluster_id
        self._model = model
        self._dimensions = dimensions
        self._era = b""
        self._keeping: set[asyncio.Task[None]] = set()

    @property
    def keeps_users_texts(self) -> bool:
        """Whether there may be something of a user that an erasure has to remove."""
        return self._write is not None

    @property
    def era(self) -> bytes:
        """To be taken before a text is embedded whose embedding is to be kept."""
        return self._era

    def hear_era(self, era: bytes) -> None:
        """What era it is in Redis."""
        self._era = era

    async def find(self, texts: Sequence[Text]) -> list[Vector | None]:
        """The embedding of each text; None where none is known."""
        found = [None if text.user_id else self._in_memory(text) for text in texts]
        missing = [number for number, vector in enumerate(found) if vector is None]
        if missing and self._write is not None:
            for number, vector in zip(missing, await self._in_redis([texts[n] for n in missing]), strict=True):
                found[number] = vector
        return found

    def keep_soon(self, texts: Sequence[Text], vectors: Sequence[Vector], era: bytes) -> None:
        """Has embeddings kept that were just made, unless there is an erasure after `era`. Nobody waits for it."""
        packed = {text: _packed(vector) for text, vector in zip(texts, vectors, strict=True) if any(vector)}
        for text, vector in packed.items():
            if not text.user_id:
                self._remember(self._digest(text), vector)
        if packed and self._write is not None and len(self._keeping) < _MOST_KEEPING:
            task = asyncio.create_task(self._keep(packed, era))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    async def drop(self, redis: Redis, user_id: str) -> None:
        """Drops the embeddings of what a user has stored. Raises what Redis' client raises."""
        await redis.delete(self._name_of_user(user_id))

    def flush(self) -> int:
        """Forgets what this router itself remembers; how much that was."""
        count = len(self._queries)
        self._queries.clear()
        return count

    async def close(self) -> None:
        """Ends what is being kept."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    def _in_memory(self, text: Text) -> Vector | None:
        packed = self._queries.get(self._digest(text))
        self.layer.looked("hit" if packed is not None else "miss")
        return None if packed is None else _unpacked(packed)

    async def _in_redis(self, texts: Sequence[Text]) -> list[Vector | None]:
        digests = [self._digest(text) for text in texts]

        async def look(redis: Redis) -> object:
            async with redis.pipeline(transaction=False) as pipeline:
                for text, digest in zip(texts, digests, strict=True):
                    if text.user_id:
                        pipeline.hget(self._name_of_user(text.user_id), digest)
                    else:
                        pipeline.get(_name_of_query(digest))
                return await pipeline.execute(raise_on_error=False)

        replies: Any = await self._redis.ask(look)
        if not isinstance(replies, list) or len(replies) != len(texts):
            replies = [SILENCE] * len(texts)
        found: list[Vector | None] = []
        for text, digest, reply in zip(texts, digests, replies, strict=True):
            packed = self._opened(text, digest, reply)
            if packed is not None and not text.user_id:
                self._remember(digest, packed)
            self.layer_redis.looked("hit" if packed else "unavailable" if reply is SILENCE else "miss")
            found.append(None if packed is None else _unpacked(packed))
        return found

    async def _keep(self, packed: dict[Text, bytes], era: bytes) -> None:
        of_users: dict[str, list[str | bytes]] = {}
        of_queries: dict[str, bytes] = {}
        for text, vector in packed.items():
            digest = self._digest(text)
            sealed = self._envelopes.seal(self._sealed_as(text, digest), "", _NOWHERE, vector)
            if text.user_id:
                of_users.setdefault(text.user_id, []).extend((digest, sealed))
            else:
                of_queries[_name_of_query(digest)] = sealed
        ttl_ms = int(self._ttl_s * 1000)

        async def keep(redis: Redis) -> None:
            for name, sealed in of_queries.items():
                await redis.set(name, sealed, px=ttl_ms)

        if of_queries:
            await self._redis.ask(keep)
        for user_id, fields in of_users.items():
            await self._redis.ask(functools.partial(self._keep_of_user, user_id, fields[: 2 * _MOST_OF_USER], era))

    async def _keep_of_user(self, user_id: str, fields: list[str | bytes], era: bytes, _: Redis) -> None:
        script: Any = self._write
        keys = [era_key(self._cluster_id), self._name_of_user(user_id)]
        await script(keys=keys, args=[era, int(self._ttl_s * 1000), _MOST_OF_USER, *fields])

    def _remember(self, digest: str, packed: bytes) -> None:
        self._queries.put(digest, packed, size_bytes=len(packed), ttl_s=self._ttl_s)

    def _opened(self, text: Text, digest: str, reply: object) -> bytes | None:
        opened = self._envelopes.open(self._sealed_as(text, digest), reply)
        if opened is None or len(opened.payload) != 4 * self._dimensions:
            return None
        return opened.payload

    def _sealed_as(self, text: Text, digest: str) -> str:
        return f"{self._name_of_user(text.user_id)}:{digest}" if text.user_id else _name_of_query(digest)

    def _digest(self, text: Text) -> str:
        return self._envelopes.digest("embedding", self._cluster_id, self._model, text.text)

    def _name_of_user(self, user_id: str) -> str:
        return f"emb:{self._envelopes.digest('embeddings of a user', self._cluster_id, user_id)}"


def _name_of_query(digest: str) -> str:
    return f"query:{digest}"


def _packed(vector: Vector) -> bytes:
    return np.asarray(vector, dtype="<f4").tobytes()


def _unpacked(packed: bytes) -> Vector:
    vector: Vector = np.frombuffer(packed, dtype="<f4").tolist()
    return vector
