"""Embedding later what was stored while the embedder was away.

The queue is the memories without an embedding themselves, so it lasts as long as they do, and moves with them: those in
slots that are not this shard's are another's to embed. A memory that was changed or deleted meanwhile keeps what it
has: the embedding is written only to the version it was made of.

A text that the model cannot embed stays in the queue: another model may, or the same server once it is mended. So what
is new goes first, and what was met before is gone through again in rounds. As many of such texts as can be remembered
are left aside for minutes; where there are more, their round pauses. However many there are, neither does a text that
can be embedded wait for them, nor is the embedder asked for them all the time.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias
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

_Clock: TypeAlias = Callable[[], float]
_Key: TypeAlias = tuple[str, UUID, int]  # user_id, id, version: others may have the same id.

_BATCH = 64
# How long a text is left aside that failed alone: others may go through while it does not, and it may when they do.
FAILED_ASIDE_S = 60.0
# The same for one that the model cannot embed, which only another model changes, or another limit of its length.
REFUSED_ASIDE_S = 600.0
# Those that are left aside at once; they are named in each statement.
MOST_ASIDE = 1000
# How long the round pauses at texts that failed and that there is no room to remember: at worst 127 exchanges, when a
# whole batch is taken apart, in ten seconds.
PAUSE_S = 10.0
_PROBE_TIMEOUT_S = 5.0
# What it is asked for to see whether it answers.
_WORD = "health"
_STATEMENT_TIMEOUT_S = 30.0
_BACKOFF_S = (0.5, 8.0)

# Oldest first, from a place on: what could not be embedded is behind it, and nobody has to wait for it.
_NEXT = """
SELECT slot, user_id, id, version, create_time, content FROM memories JOIN owned_slots USING (slot)
WHERE state = 'own' AND embedding IS NULL AND deleted_at IS NULL AND (expire_time IS NULL OR expire_time > now())
    AND (create_time, id, user_id) > ($2, $3, $4)
    AND (user_id, id, version) NOT IN (SELECT * FROM unnest($5::text[], $6::uuid[], $7::bigint[]))
ORDER BY create_time, id, user_id LIMIT $1
"""
_EMBED = """
WITH own AS MATERIALIZED (SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE)
UPDATE memories SET embedding = $5, embedding_model = $6 FROM own
WHERE memories.slot = own.slot AND user_id = $2 AND id = $3 AND version = $4 AND create_time = $7 AND embedding IS NULL
    AND deleted_at IS NULL
"""

_BEGINNING = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0), "")


@dataclass(slots=True)
class _Place:
    """How far the queue was gone through: create_time, id and user_id of the last that was dealt with."""

    after: tuple[datetime, UUID, str] = _BEGINNING


class EmbeddingQueue:
    """Embeds what waits, in the background, if there is an embedder. `wake` tells it that something new does."""

    def __init__(
        self,
        database: Database,
        identity: Identity,
        embedder: Embedder | None,
        *,
        interval_s: float,
        clock: _Clock = time.monotonic,
    ) -> None:
        self._database = database
        self._identity = identity
        self._embedder = embedder
        self._interval_s = interval_s
        self._wake = asyncio.Event()
        self._clock = clock
        # What is passed over, and until when.
        self._aside: dict[_Key, float] = {}
        # What is behind the newest place was met before, or came in with an earlier time: the round finds it.
        self._newest, self._round = _Place(), _Place()
        self._round_pauses_until = 0.0
        self._size = _BATCH

    def wake(self) -> None:
        """Something was stored without an embedding."""
        self._wake.set()

    async def run(self) -> None:
        """Works until cancelled; while the embedder or the database is away, it tries again with backoff."""
        backoff_s, longest_s = _BACKOFF_S
        put_off = False
        while True:
            try:
                if put_off:
                    await self._look()
                while self._embedder is not None and await self.embed_batch(self._embedder):
                    backoff_s = _BACKOFF_S[0]
                if self._embedder is not None:
                    await self._prove(self._embedder)
            except Exception as error:
                # Also by a bug: the service, which would end with its queue, serves all the same.
                if isinstance(error, MemshardError | TimeoutError | asyncpg.PostgresError):
                    _log.warning("embedding put off", error=type(error).__name__, retry_s=backoff_s)
                else:
                    _log.error("embedding failed by a bug", **logs.describe_bug(error), retry_s=backoff_s)
                # Not cut short by what is stored meanwhile, or each store would be another attempt.
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, longest_s)
                put_off = True
                continue
            put_off = False
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()

    async def embed_batch(self, embedder: Embedder) -> int:
        """Embeds the next that wait, and returns how many those were; 0: nothing is to be done now. Raises Unavailable.

        What an embedder fails at that embeds a word all the same is one of the texts, or that they are too many: the
        next attempt is of half as many, and one that failed alone is left aside for a while, so that it keeps no others
        back.
        """
        rows, place = await self._next()
        if not rows:
            return 0
        try:
            vectors = await self._embed(embedder, [row["content"] for row in rows])
        except Exception as error:  # A text may as well meet a bug, and would keep all others back for ever.
            if getattr(error, "reason", "") != BREAKER_OPEN and await self._look():
                if len(rows) == 1:
                    self._leave_aside(rows, FAILED_ASIDE_S)
                    _go_on(place, rows)
                self._size = max(1, len(rows) // 2)
            raise
        refused = await self._write(rows, vectors)
        self._leave_aside(refused, REFUSED_ASIDE_S)
        _go_on(place, rows)
        self._size = min(_BATCH, self._size * 2)
        return len(rows)

    async def _next(self) -> tuple[list[asyncpg.Record], _Place]:
        """The next batch, and which place it begins at: the newest or, where nothing is new, that of the round."""
        now = self._clock()
        self._aside = {key: until for key, until in self._aside.items() if until > now}
        if (rows := await self._waiting(self._newest)) or now < self._round_pauses_until:
            return rows, self._newest
        rows = await self._waiting(self._round)
        if not rows:
            self._round.after = _BEGINNING  # For the next look, which comes after a pause.
        return rows, self._round

    async def _waiting(self, place: _Place) -> list[asyncpg.Record]:
        users, ids, versions = [[key[part] for key in self._aside] for part in range(3)]
        deadline = Deadline.after(_STATEMENT_TIMEOUT_S)
        async with deadline.bound(), self._database.reading(deadline) as connection:
            return await connection.fetch(_NEXT, self._size, *place.after, users, ids, versions)

    def _leave_aside(self, rows: Sequence[asyncpg.Record], seconds: float) -> None:
        now = self._clock()
        for row in rows:
            if len(self._aside) >= MOST_ASIDE:
                # They will be met again in the next round: not at once, whatever wakes it.
                self._round_pauses_until = now + PAUSE_S
                return
            self._aside[row["user_id"], row["id"], row["version"]] = now + seconds

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
    ) -> list[asyncpg.Record]:
        """Those that have no embedding."""
        refused = []
        deadline = Deadline.after(_STATEMENT_TIMEOUT_S)
        async with deadline.bound(), self._database.reading(deadline) as connection:
            for row, vector in zip(rows, vectors, strict=True):
                if vector is None:
                    refused.append(row)
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
        _log.info("embedded", memories=len(rows) - len(refused), refused=len(refused))
        return refused


def _go_on(place: _Place, rows: Sequence[asyncpg.Record]) -> None:
    """These are dealt with, whether or not they have an embedding now."""
    last = rows[-1]
    place.after = (last["create_time"], last["id"], last["user_id"])
