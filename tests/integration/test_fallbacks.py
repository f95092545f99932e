"""What a search answers with when neither meaning nor words find anything, and who may be away then."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.embedding_server import DIMENSIONS, EmbeddingServer
from tests.support.eventually import eventually
from tests.support.wire import memory_service, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

CONTENTS = ("green tea", "black coffee", "red wine", "cold water", "hot milk", "apple juice")


@dataclass(frozen=True)
class Parched:
    """A cluster whose embedder is down, and in which memories of a user are on both shards."""

    cluster: LocalCluster
    api: "MemoryServiceAsyncStub"
    user: str

    async def search(self, query: str, **fields: object) -> pb.SearchMemoriesResponse:
        return await self.api.SearchMemories(
            pb.SearchMemoriesRequest(user_id=self.user, query=query, **fields)  # type: ignore[arg-type]
        )

    async def finds(self, query: str, kind: "pb.ScoreKind.ValueType") -> pb.SearchMemoriesResponse | None:
        found = await self.search(query)
        return found if found.score_kind == kind else None

    @asynccontextmanager
    async def level(self, level: str) -> AsyncIterator[None]:
        await self.cluster.run("degrade", level)
        try:
            yield
        finally:
            await self.cluster.run("degrade", "normal")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def parched() -> AsyncIterator[Parched]:
    with EmbeddingServer() as server:
        options = ["--embedder-url", server.url, "--embedder-model", "words", "--placement", "content_hash"]
        async with (
            LocalCluster(shards=2, replicas=0, embedder="http", dimensions=DIMENSIONS, options=options) as cluster,
            memory_service(cluster.address) as api,
        ):
            user = "fallbacks"
            for content in CONTENTS:
                await api.StoreMemory(store_request(user, content))
            server.down = True
            yield Parched(cluster, api, user)


def contents(found: pb.SearchMemoriesResponse) -> list[str]:
    return [result.memory.content for result in found.results]


async def test_what_neither_meaning_nor_words_find_is_nothing_at_the_level_normal(parched: Parched) -> None:
    found = await parched.search("nonsense")
    assert (contents(found), found.score_kind) == ([], pb.SCORE_KIND_TEXT_RANK)
    assert "fallback" in found.report.served_by
    assert contents(await parched.search("coffee")) == ["black coffee"]


async def test_at_the_level_essential_it_is_the_newest_and_the_answer_says_so(parched: Parched) -> None:
    async with parched.level("essential"):
        found = await eventually(lambda: parched.finds("nonsense", pb.SCORE_KIND_RECENCY))
        assert found is not None
        assert contents(found) == list(reversed(CONTENTS))
        assert "fallback" in found.report.served_by
        assert found.report.degradation_level == pb.DEGRADATION_LEVEL_ESSENTIAL
        assert contents(await parched.search("nonsense", limit=2, offset=1)) == ["hot milk", "cold water"]
        # Versions, whose answer has no field for it, say so behind it.
        listing = parched.api.ListMemoryVersions(
            pb.ListMemoryVersionsRequest(id=found.results[0].memory.id, user_id=parched.user)
        )
        assert dict(await listing.trailing_metadata())["memshard-degradation-level"] == "essential"
        # What words find is found by words.
        words = await parched.search("coffee")
        assert (contents(words), words.score_kind) == (["black coffee"], pb.SCORE_KIND_TEXT_RANK)


@pytest.mark.parametrize("away", ["shard-0", "shard-1"])
async def test_with_a_shard_away_what_words_found_is_the_answer_and_names_it(parched: Parched, away: str) -> None:
    async with parched.level("essential"):
        assert await eventually(lambda: parched.finds("nonsense", pb.SCORE_KIND_RECENCY))
        await parched.cluster.run("shards", "set", away, "--status", "maintenance")
        try:

            async def partial() -> pb.SearchMemoriesResponse | None:
                found = await parched.search("nonsense")
                return found if found.report.shards.failed else None

            found = await eventually(partial)
            assert found is not None
            assert (contents(found), found.score_kind) == ([], pb.SCORE_KIND_TEXT_RANK)
            assert [failure.shard_id for failure in found.report.shards.failed] == [away]
        finally:
            await parched.cluster.run("shards", "set", away, "--status", "active")
        assert await eventually(lambda: parched.finds("nonsense", pb.SCORE_KIND_RECENCY))
