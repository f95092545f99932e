"""Embeddings for requests: what callers of an embedding server that hangs learn, and for how long they wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from common.breaker import BREAKER_OPEN, CircuitBreaker, State
from common.breaker_settings import EMBEDDER
from common.config import RouterSettings
from common.deadline import Deadline
from common.embedder import TEXT_REFUSED, HttpEmbedder
from common.errors import Unavailable
from memshard.v1 import memory_pb2 as pb
from router.embed import LATER, Embedding
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


async def test_a_text_that_the_embedder_refuses_is_kept_like_one_that_it_is_away_for() -> None:
    with EmbeddingServer() as server:
        async with embedder_of(server) as embedder:
            server.refused = "indigestible"
            embedding = Embedding(embedder)
            memory = pb.Memory(user_id="a", content="an indigestible text")
            assert await embedding.of_memory(memory, Deadline.after(_TIMEOUT_S)) == LATER
            with pytest.raises(Unavailable) as refused:  # Which has searches go by words.
                await embedding.of_query("an indigestible text", Deadline.after(_TIMEOUT_S))
            assert refused.value.reason == TEXT_REFUSED
            assert embedder.breaker.state is State.CLOSED


@pytest.mark.parametrize(("timeout_s", "state"), [(_TIMEOUT_S / 2 - 0.02, State.OPEN), (0.2, State.CLOSED)])
def test_a_second_is_a_fair_chance_and_a_hurried_caller_cuts_off_nobody(timeout_s: float, state: State) -> None:
    breaker = CircuitBreaker("the embedder", EMBEDDER, Clock())
    for _ in range(10):
        breaker.admit().timeout(timeout_s)
    assert breaker.state is state
