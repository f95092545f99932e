"""Embeddings for requests: what callers of an embedding server that hangs learn, and for how long they wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common.breaker import BREAKER_OPEN, CircuitBreaker, State
from common.breaker_settings import EMBEDDER
from common.config import RouterSettings
from common.deadline import Deadline
from common.embedder import HttpEmbedder
from common.errors import Unavailable
from router.embed import Embedding
from tests.support.clock import Clock
from tests.support.embedding_server import DIMENSIONS, EmbeddingServer

# What agents give a call; the embedder has half of it.
_TIMEOUT_S = 2.0


@asynccontextmanager
async def embedder_of(server: EmbeddingServer) -> AsyncIterator[HttpEmbedder]:
    settings = RouterSettings(catalog_dsn="postgresql://unused", embedder="http", embedder_url=server.url)  # type: ignore[arg-type]
    embedder = HttpEmbedder(settings, "words", DIMENSIONS)
    try:
        yield embedder
    finally:
        await embedder.close()


async def test_an_embedder_that_hangs_is_cut_off_by_callers_with_two_seconds() -> None:
    with EmbeddingServer() as server:
        async with embedder_of(server) as embedder:
            server.at_work.clear()
            embedding = Embedding(embedder)
            callers = (embedding.of_query("green tea", Deadline.after(_TIMEOUT_S)) for _ in range(10))
            failed = await asyncio.gather(*callers, return_exceptions=True)
            assert [getattr(error, "reason", error) for error in failed] == ["EMBEDDER_UNAVAILABLE"] * 10
            assert embedder.breaker.state is State.OPEN
            with pytest.raises(Unavailable) as refused:
                await embedding.of_query("green tea", Deadline.after(_TIMEOUT_S))
            assert refused.value.reason == BREAKER_OPEN


@pytest.mark.parametrize(("timeout_s", "state"), [(_TIMEOUT_S / 2 - 0.02, State.OPEN), (0.2, State.CLOSED)])
def test_a_second_is_a_fair_chance_and_a_hurried_caller_cuts_off_nobody(timeout_s: float, state: State) -> None:
    breaker = CircuitBreaker("the embedder", EMBEDDER, Clock())
    for _ in range(10):
        breaker.admit().timeout(timeout_s)
    assert breaker.state is state
