"""The queue of texts to embed, where more of them are refused than anybody remembers: the others go through, and the
embedder is left in peace."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import numpy as np
import pytest
import pytest_asyncio
from pgvector.asyncpg import register_vector

from common.embedder import TEXT_REFUSED, Vectors
from common.errors import Unavailable
from common.postgres import Pool
from shard import embedding_queue, identity
from shard.database import Database, settle
from shard.embedding_queue import FAILED_ASIDE_S, PAUSE_S, REFUSED_ASIDE_S, EmbeddingQueue
from shard.timed_connection import TimedConnection
from tests.support.clock import Clock
from tests.support.cluster import LocalCluster

DIMENSIONS = 3
BATCH = 64
# What a batch costs that is taken apart until every text of it is alone.
MOST_EXCHANGES = 2 * BATCH - 1

# `$4` seconds ago and a microsecond apart, a hundred of them at the same time.
_INSERT = """
INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                      embedding_model, create_time)
SELECT 7, $1, gen_random_uuid(), '', '', '', 1, 0.5, $2, '{}', '',
       now() - make_interval(secs => $4::float8 - n / 100 * 1e-6)
FROM generate_series(1, $3) AS n
"""
_WAITING = "SELECT count(*) FROM memories WHERE user_id = $1 AND content = $2 AND embedding IS NULL"
REFUSED = Unavailable("not this text", reason=TEXT_REFUSED)


class Picky:
    """An embedder that cannot embed certain texts; of each exchange it notes how many there were."""

    model, dimensions, breaker = "words", DIMENSIONS, None

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.well = False
        self.exchanges: list[int] = []

    async def embed(self, texts: Sequence[str], timeout_s: float | None = None) -> Vectors:
        self.exchanges.append(len(texts))
        if not self.well and "bad" in texts:
            raise self.error
        return np.ones((len(texts), DIMENSIONS), dtype=np.float32)

    async def probe(self, timeout_s: float) -> None:
        """It is there."""

    async def close(self) -> None:
        """Nothing to let go of."""


class Waiting:
    """A queue on a clock of the test's own, and the texts of one user in it."""

    def __init__(self, pool: Pool, known: identity.Identity, user: str, error: Exception) -> None:
        self.clock = Clock()
        self.embedder = Picky(error)
        self._pool = pool
        self._user = user
        self._queue = EmbeddingQueue(Database(pool), known, self.embedder, interval_s=1, clock=self.clock)

    async def store(self, text: str, count: int = 1, *, ago_s: float = 0.0) -> None:
        """`ago_s`: as if the text had been changed since then, or come from another shard."""
        await self._pool.execute(_INSERT, self._user, text, count, ago_s)

    async def left(self, text: str) -> int:
        count: int = await self._pool.fetchval(_WAITING, self._user, text)
        return count

    async def look(self, most: int = 10_000) -> int:
        """What the queue does until it pauses; how often the embedder was asked."""
        before = len(self.embedder.exchanges)
        for _ in range(most):
            try:
                if not await self._queue.embed_batch(self.embedder):
                    return len(self.embedder.exchanges) - before
            except type(self.embedder.error):
                continue  # After a while, which is none here.
        raise AssertionError("the queue turns without a pause")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster() -> AsyncIterator[LocalCluster]:
    """A shard whose own queue does nothing."""
    async with LocalCluster(shards=1, embedder="none", dimensions=DIMENSIONS) as running:
        yield running


@asynccontextmanager
async def waiting_in(cluster: LocalCluster, user: str, error: Exception = REFUSED) -> AsyncIterator[Waiting]:
    async with asyncpg.create_pool(
        cluster.shard_dsn("shard-0"),
        min_size=1,
        max_size=1,
        connection_class=TimedConnection,
        reset=settle,
        init=register_vector,
    ) as pool:
        await pool.execute("DELETE FROM memories")
        async with pool.acquire() as connection:
            known = await identity.read(connection)
        assert known is not None
        yield Waiting(pool, known, user, error)


@pytest.mark.parametrize(
    "error", [REFUSED, Unavailable("it chokes", reason="EMBEDDER_UNAVAILABLE"), ValueError("a bug")], ids=repr
)
async def test_more_texts_that_cannot_be_embedded_than_are_remembered_keep_no_other_waiting(
    cluster: LocalCluster, user: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    if error is not REFUSED:  # Each is found out alone.
        monkeypatch.setattr(embedding_queue, "MOST_ASIDE", 100)
    bad = embedding_queue.MOST_ASIDE + 3 * BATCH
    async with waiting_in(cluster, user, error) as waiting:
        await waiting.store("bad", bad, ago_s=3600)
        await waiting.store("good", 100)
        await waiting.look()
        assert (await waiting.left("bad"), await waiting.left("good")) == (bad, 0)
        # Whatever wakes it, it asks for none of them again before its pause is over, ...
        for _ in range(50):
            assert await waiting.look() == 0
        # ... and for what is new at once.
        await waiting.store("new")
        assert await waiting.look() == 1
        assert await waiting.left("new") == 0
        # What has come in between those is met before long, though a part of them at a time is tried.
        await waiting.store("changed", ago_s=1800)
        for _ in range(3 * BATCH + 2):
            waiting.clock.pass_(PAUSE_S)
            assert await waiting.look() <= MOST_EXCHANGES
            if not await waiting.left("changed"):
                break
        assert await waiting.left("changed") == 0


async def test_a_text_that_was_refused_is_tried_again_and_embedded_once_it_can_be(
    cluster: LocalCluster, user: str
) -> None:
    bad = embedding_queue.MOST_ASIDE + 3 * BATCH
    async with waiting_in(cluster, user) as waiting:
        await waiting.store("bad", bad)
        await waiting.look()
        waiting.embedder.well = True
        # Those that nobody remembers come first, those that are left aside when their time is over.
        waiting.clock.pass_(PAUSE_S)
        await waiting.look()
        assert await waiting.left("bad") == embedding_queue.MOST_ASIDE
        waiting.clock.pass_(REFUSED_ASIDE_S)
        await waiting.look()
        assert await waiting.left("bad") == 0


async def test_a_few_that_are_refused_cost_nothing_until_it_is_time_to_try_them_again(
    cluster: LocalCluster, user: str
) -> None:
    async with waiting_in(cluster, user) as waiting:
        await waiting.store("bad", BATCH)
        assert await waiting.look() == MOST_EXCHANGES
        for _ in range(5):
            waiting.clock.pass_(FAILED_ASIDE_S)
            # Between those that are left aside, without waiting for the next round to be due.
            await waiting.store("changed", ago_s=3600)
            assert await waiting.look() == 1
        assert await waiting.left("changed") == 0
        waiting.clock.pass_(REFUSED_ASIDE_S)
        assert await waiting.look() == MOST_EXCHANGES
