"""Keyword search in another language than English: words are found by their stems, and its small words find nothing."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.wire import memory_service, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

TEXTS = ["Die Häuser am See", "Sie spielt Geige", "Tee mit Milch", "The houses by the lake"]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["user_based", "content_hash"])
async def german(request: pytest.FixtureRequest) -> "AsyncIterator[MemoryServiceAsyncStub]":
    options = ["--text-language", "german", "--placement", request.param]
    async with LocalCluster(shards=2, options=options) as cluster, memory_service(cluster.address) as api:
        yield api


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("Haus", ["Die Häuser am See"]),
        ("HÄUSERN", ["Die Häuser am See"]),
        ("Geigen spielen", ["Sie spielt Geige"]),
        ("See und Milch", ["Die Häuser am See", "Tee mit Milch"]),
        ("die und mit", []),
        ("the", ["The houses by the lake"]),
    ],
)
async def test_words_are_found_by_their_stems(
    german: "MemoryServiceAsyncStub", user: str, query: str, found: list[str]
) -> None:
    memories = [pb.Memory(user_id=user, content=text) for text in TEXTS]
    await german.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories))
    search = pb.SearchMemoriesRequest(user_id=user, query=query, mode=pb.SEARCH_MODE_KEYWORD)
    answer = await german.SearchMemories(search)
    assert sorted(result.memory.content for result in answer.results) == found


async def test_an_updated_text_is_found_by_its_new_stems(german: "MemoryServiceAsyncStub", user: str) -> None:
    memory = (await german.StoreMemory(store_request(user, "Der Hund bellt"))).memory
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, user_id=user, content="Die Katzen schlafen"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
    )
    await german.UpdateMemory(change)
    for query, count in (("Hunde", 0), ("Katze schläft", 1)):
        search = pb.SearchMemoriesRequest(user_id=user, query=query, mode=pb.SEARCH_MODE_KEYWORD)
        assert len((await german.SearchMemories(search)).results) == count
