"""An embedder that is away: texts are kept, found by their words, and embedded once it is back."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2
from redis.asyncio import Redis

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import PATIENT_WITH_REDIS, LocalCluster
from tests.support.embedding_server import DIMENSIONS, EmbeddingServer, embedding_of
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.wire import memory_service, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

PENDING, READY = pb.EMBEDDING_STATE_PENDING, pb.EMBEDDING_STATE_READY


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddingServer]:
    with EmbeddingServer() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def asking(server: EmbeddingServer) -> AsyncIterator[LocalCluster]:
    """A cluster that asks the server for embeddings."""
    options = ["--embedder-url", server.url, "--embedder-model", "words"]
    async with LocalCluster(
        shards=1, embedder="http", dimensions=DIMENSIONS, options=options, environment=PATIENT_WITH_REDIS
    ) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def remote(asking: LocalCluster) -> "AsyncIterator[MemoryServiceAsyncStub]":
    """Its API."""
    async with memory_service(asking.address) as api:
        yield api


@pytest.fixture(autouse=True)
def up_again(server: EmbeddingServer) -> Iterator[None]:
    yield
    server.down = False
    server.at_work.set()


async def state(api: "MemoryServiceAsyncStub", memory: pb.Memory) -> int:
    got = await api.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=memory.user_id))
    return got.memory.embedding_state


async def is_ready(api: "MemoryServiceAsyncStub", memory: pb.Memory) -> bool:
    return await state(api, memory) == READY


async def test_with_the_server_up_texts_are_embedded_at_once(remote: "MemoryServiceAsyncStub", user: str) -> None:
    stored = (await remote.StoreMemory(store_request(user, "green tea"))).memory
    assert (stored.embedding_state, stored.embedding_model) == (READY, "words")
    await remote.StoreMemory(store_request(user, "black coffee"))
    found = await remote.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="green tea"))
    assert [r.memory.content for r in found.results] == ["green tea", "black coffee"]


async def test_what_a_shard_embeds_later_and_its_breaker_show_on_its_page(
    asking: LocalCluster, remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    async def page() -> tuple[float, float, float]:
        """The state of the breaker; how many texts, in how many exchanges, were embedded and were not."""
        families = await families_of(asking, "shard-0")
        (breaker,) = families["circuit_breaker_state"].samples
        assert breaker.labels == {"name": "the embedder", "kind": "all"}
        counts = {
            sample.labels["outcome"]: sample.value
            for sample in families["memory_embedding_duration_seconds"].samples
            if sample.name.endswith("_count")
        }
        return breaker.value, counts["ok"], counts["failed"]

    state_before, ok, failed = await page()
    assert state_before == 0
    server.down = True
    stored = (await remote.StoreMemory(store_request(user, "embedded later"))).memory

    async def is_open() -> bool:
        state_now, _, failed_now = await page()
        return state_now == 2 and failed_now > failed

    await eventually(is_open, within_s=40)
    server.down = False
    await eventually(partial(is_ready, remote, stored), within_s=20)

    async def is_closed() -> bool:
        # Though one text is not proof enough, and no more come.
        state_now, ok_now, _ = await page()
        return state_now == 0 and ok_now > ok

    await eventually(is_closed, within_s=20)


async def test_a_text_stored_while_it_is_down_is_found_by_words_and_embedded_when_it_is_back(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    before = (await remote.StoreMemory(store_request(user, "something else entirely"))).memory
    server.down = True
    stored = (await remote.StoreMemory(store_request(user, "kept without an embedding"))).memory
    assert stored.embedding_state == PENDING
    search = pb.SearchMemoriesRequest(user_id=user, query="kept embedding", mode=pb.SEARCH_MODE_SEMANTIC)
    words = await remote.SearchMemories(search)
    assert words.results[0].memory.id == stored.id
    assert words.score_kind == pb.SCORE_KIND_TEXT_RANK
    assert list(words.report.served_by) == ["primary", "fallback"]
    # By embedding it is not found yet, and the answer says that one is missing.
    near = remote.SearchMemories(pb.SearchMemoriesRequest(user_id=user, embedding=embedding_of("kept")))
    assert [r.memory.id for r in (await near).results] == [before.id]
    assert dict(await near.trailing_metadata())["memshard-unembedded"] == "1"
    server.down = False
    await eventually(lambda: is_ready(remote, stored), within_s=20)
    found = remote.SearchMemories(search)
    assert (await found).results[0].memory.id == stored.id
    assert (await found).score_kind == pb.SCORE_KIND_COSINE
    assert "memshard-unembedded" not in dict(await found.trailing_metadata())


async def test_a_slow_embedder_does_not_cost_a_store_its_deadline(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    """It has half of the caller's time; the text is stored in the other half."""
    server.at_work.clear()
    stored = (await remote.StoreMemory(store_request(user, "in good time"), timeout=6)).memory
    batch = pb.BatchStoreMemoriesRequest(memories=[pb.Memory(user_id=user, content="in good time too")])
    assert (await remote.BatchStoreMemories(batch, timeout=6)).results[0].id
    assert stored.embedding_state == PENDING
    server.at_work.set()
    await eventually(lambda: is_ready(remote, stored), within_s=20)


async def test_a_search_falls_back_to_words_in_good_time_when_the_server_thinks_for_too_long(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    await remote.StoreMemory(store_request(user, "green tea"))
    server.at_work.clear()
    found = await remote.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="tea"), timeout=6)
    assert [r.memory.content for r in found.results] == ["green tea"]
    assert found.score_kind == pb.SCORE_KIND_TEXT_RANK


async def test_what_waits_for_its_embedding_is_neither_resurrected_nor_given_that_of_an_older_text(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    server.down = True
    deleted, updated = [
        (await remote.StoreMemory(store_request(user, text))).memory for text in ("to be deleted", "first text")
    ]
    await remote.DeleteMemory(pb.DeleteMemoryRequest(id=deleted.id, user_id=user))
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=updated.id, user_id=user, content="second words"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
    )
    assert (await remote.UpdateMemory(change)).memory.embedding_state == PENDING
    server.down = False
    await eventually(lambda: is_ready(remote, updated), within_s=20)
    listed = await remote.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert [memory.content for memory in listed.memories] == ["second words"]

    async def by_embedding() -> pb.SearchMemoriesResponse | None:
        # By words until the router's breaker lets texts through again.
        found = await remote.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="second words"))
        return found if found.score_kind == pb.SCORE_KIND_COSINE else None

    found = await eventually(by_embedding, within_s=20)
    assert found is not None
    assert found.results[0].score == pytest.approx(1, abs=1e-3)


async def test_an_update_of_the_text_makes_a_new_embedding_and_of_anything_else_none(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    stored = (await remote.StoreMemory(store_request(user, "old words"))).memory
    server.texts.clear()
    change = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=stored.id, user_id=user, importance=0.1),
        update_mask=field_mask_pb2.FieldMask(paths=["importance"]),
    )
    await remote.UpdateMemory(change)
    # The health monitor asks for a word of its own now and then.
    assert "old words" not in server.texts


async def test_a_text_that_the_model_refuses_keeps_none_of_the_others_waiting(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    server.down, server.refused = True, "indigestible"
    texts = [f"text {n}" for n in range(5)]
    refused = (await remote.StoreMemory(store_request(user, "an indigestible text"))).memory
    others = [(await remote.StoreMemory(store_request(user, text))).memory for text in texts]
    server.down = False
    for memory in others:
        await eventually(lambda m=memory: is_ready(remote, m), within_s=20)  # type: ignore[misc]
    assert await state(remote, refused) == PENDING
    server.refused = ""


async def test_a_batch_stored_while_it_is_down_is_embedded_later(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    server.down = True
    memories = [pb.Memory(user_id=user, content=f"text number {n}") for n in range(150)]
    answer = await remote.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories))
    assert all(result.id for result in answer.results)
    server.down = False

    async def all_ready() -> bool:
        page = await remote.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000))
        return len(page.memories) == 150 and all(m.embedding_state == READY for m in page.memories)

    await eventually(all_ready, within_s=30)


async def test_a_text_that_the_server_chokes_on_keeps_no_other_back(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    server.fails_at = "poison"
    try:
        poison = (await remote.StoreMemory(store_request(user, "poison tea"))).memory
        server.down = True
        others = [(await remote.StoreMemory(store_request(user, f"tea number {n}"))).memory for n in range(3)]
        server.down = False
        for other in others:
            await eventually(partial(is_ready, remote, other), within_s=60)
        assert await state(remote, poison) == PENDING
    finally:
        server.fails_at = ""


async def test_an_embedder_that_is_back_is_noticed_within_seconds_and_not_when_its_breaker_would_try(
    remote: "MemoryServiceAsyncStub", server: EmbeddingServer, user: str
) -> None:
    server.down = True
    # Enough to open the router's breaker, and that of the shard's queue, for a while.
    for number in range(15):
        await remote.StoreMemory(store_request(user, f"tea {number}"))
    server.down = False

    async def by_meaning() -> bool:
        found = await remote.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="tea"))
        return found.score_kind == pb.SCORE_KIND_COSINE

    await eventually(by_meaning, within_s=25)


async def test_an_erasure_removes_what_was_made_of_a_users_texts_also_when_no_memory_is_left(
    asking: LocalCluster, remote: "MemoryServiceAsyncStub", user: str
) -> None:
    redis = Redis.from_url(asking.redis_url())
    try:

        async def names() -> set[bytes]:
            return {name async for name in redis.scan_iter("emb:*")}

        async def new() -> set[bytes]:
            return await names() - before

        before = await names()
        await remote.StoreMemory(store_request(user, "something of mine"))
        (name,) = await eventually(new)
        await remote.EraseUser(pb.EraseUserRequest(user_id=user))
        assert name not in await names()
        await redis.hset(name, "left", "behind")
        await remote.EraseUser(pb.EraseUserRequest(user_id=user))
        assert name not in await names()
    finally:
        await redis.aclose()
