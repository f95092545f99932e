"""Embedding later what was stored while the embedder was away.

The queue is the memories without an embedding themselves, so it lasts as long as they do, and moves with them: those in
slots that are not this shard's are another's to embed. A memory that was changed or deleted meanwhile keeps what it
has: the embedding is written only to the version it was made of.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from uuid import UUID

import asyncpg

from common import logs
from common.breaker import BREAKER_OPEN, State
from common.deadline import Deadline
from common.embedder import TEXT_REFUSED, Embedder, Vectors, observed
from common.errors import MemshardError, Unavailable
from shard.database import Database
from shard.identity import Identity
from shard.rows import to_vector

_log = logs.get_logger("embedding queue")

_BATCH = 64
# How long a text is left aside that failed alone: others may go through while it does not, and it may when they do.
_ASIDE_S = 60.0
_PROBE_TIMEOUT_S = 5.0
# What it is asked for to see whether it answers.
_WORD = "health"
# Texts that the model cannot embed, remembered so as not to begin with them every time.
_MAX_HOPELESS = 1000
_STATEMENT_TIMEOUT_S = 30.0
_BACKOFF_S = (0.5, 8.0)

# Oldest first. A text that the model cannot embed would come back every time: it is passed over by id.
_NEXT = """
SELECT slot, user_id, id, version, create_time, content FROM memories JOIN owned_slots USING (slot)
WHERE state = 'own' AND embedding IS NULL AND deleted_at IS NULL AND (expire_time IS NULL OR expire_time > now())
    AND (id, version) NOT IN (SELECT * FROM unnest($2::uuid[], $3::bigint[]))
ORDER BY create_time LIMIT $1
"""
_EMBED = """
WITH own AS MATERIALIZED (SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE)
UPDATE memories SET embedding = $5, embedding_model = $6 FROM own
WHERE memories.slot = own.slot AND user_id = $2 AND id = $3 AND version = $4 AND create_time = $7 AND embedding IS NULL
    AND deleted_at IS NULL
"""


class EmbeddingQueue:
    """Embeds what waits, in the background, if there is an embedder. `wake` tells it that something new does."""

    def __init__(self, database: Database, identity: Identity, embedder: Embedder | None, *, interval_s: float) -> None:
        self._database = database
        self._identity = identity
        self._embedder = embedder
        self._interval_s = interval_s
        self._wake = asyncio.Event()
        self._hopeless: deque[tuple[UUID, int]] = deque(maxlen=_MAX_HOPELESS)
        self._aside: dict[tuple[UUID, int], float] = {}
        self._size = _BATCH

    def wake(self) -> None:
        """Something was stored without an embedding."""
        self._wake.set()

    async def run(self) -> None:
        """Works until cancelled; while the embedder or the database is away, it tries again with backoff."""
        backoff_s, longest_s = _BACKOFF_S
        while True:
            try:
                while self._embedder is not None and await self.embed_batch(self._embedder):
                    backoff_s = _BACKOFF_S[0]
                if self._embedder is not None:
                    await self._prove(self._embedder)
            except (MemshardError, TimeoutError, asyncpg.PostgresError) as error:
                _log.warning("embedding put off", error=type(error).__name__, retry_s=backoff_s)
                # Not cut short by what is stored meanwhile, or each store would be another attempt.
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, longest_s)
                await self._look()
                continue
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()

    async def embed_batch(self, embedder: Embedder) -> int:
        """Embeds the oldest that wait, and returns how many those were. Raises Unavailable.

        What an embedder fails at that embeds a word all the same is one of the texts, or that they are too many: the
        next attempt is of half as many, and one that failed alone is left aside for a while, so that it keeps no others
        back.
        """
        now = time.monotonic()
        self._aside = {key: until for key, until in self._aside.items() if until > now}
        passed_over = [*self._hopeless, *self._aside]
        deadline = Deadline.after(_STATEMENT_TIMEOUT_S)
        async with deadline.bound(), self._database.reading(deadline) as connection:
            rows = await connection.fetch(
                _NEXT,
                self._size,
                [memory_id for memory_id, _ in passed_over],
                [version for _, version in passed_over],
            )
        if not rows:
            return 0
        try:
            vectors = await self._embed(embedder, [row["content"] for row in rows])
        except Unavailable as error:
            if error.reason != BREAKER_OPEN and await self._look():
                if len(rows) == 1 and len(self._aside) < _MAX_HOPELESS:
                    self._aside[rows[0]["id"], rows[0]["version"]] = time.monotonic() + _ASIDE_S
                self._size = max(1, len(rows) // 2)
            raise
        await self._write(rows, vectors)
        self._size = min(_BATCH, self._size * 2)
        return len(rows)

    async def _look(self) -> bool:
        """Whether the embedder answers. If so it is asked again at once, rather than when its breaker would try."""
        if self._embedder is None:
            return False
        try:
            await self._embedder.probe(_PROBE_TIMEOUT_S)
        except MemshardError:
            return False
        return True

    async def _prove(self, embedder: Embedder) -> None:
        """With nothing left to embed, nobody else would find out that the embedder is well again, and its breaker be
        shown as it was for ever. Raises Unavailable."""
        breaker = embedder.breaker
        if breaker is not None and breaker.state is not State.CLOSED and await self._look():
            for _ in range(breaker.settings.probes):
                await embedder.embed([_WORD])

    async def _embed(self, embedder: Embedder, texts: Sequence[str]) -> "list[Vectors | None]":
        """The embedding of each text; None for one that the model cannot embed, which keeps none of the others back."""
        try:
            return [vector if vector.any() else None for vector in await observed(embedder.embed(texts))]
        except Unavailable as error:
            if error.reason != TEXT_REFUSED:
                raise
        if len(texts) == 1:
            return [None]
        middle = len(texts) // 2
        return [*await self._embed(embedder, texts[:middle]), *await self._embed(embedder, texts[middle:])]

    async def _write(
        self,
        rows: Sequence[asyncpg.Record],
        vectors: "Sequence[Vectors | None]",
    ) -> None:
        deadline = Deadline.after(_STATEMENT_TIMEOUT_S)
        async with deadline.bound(), self._database.reading(deadline) as connection:
            for row, vector in zip(rows, vectors, strict=True):
                if vector is None:
                    self._hopeless.append((row["id"], row["version"]))
                    continue
                await connection.execute(
                    _EMBED,
                    row["slot"],
                    row["user_id"],
                    row["id"],
                    row["version"],
                    to_vector(vector, self._identity.precision),
                    self._identity.embedding_model,
                    row["create_time"],
                )
        _log.info("embedded", memories=len(rows))
