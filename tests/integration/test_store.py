"""Storing once, whatever is repeated; deleting for good; nobody else's memories."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import timestamp_pb2

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, fields_of, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


def new_id() -> str:
    return str(uuid.uuid4())


async def contents(api: "MemoryServiceAsyncStub", user_id: str) -> list[str]:
    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user_id, page_size=1000))
    assert not page.next_page_token
    return [memory.content for memory in page.memories]


async def test_the_same_store_again_is_the_same_success(api: "MemoryServiceAsyncStub", user: str) -> None:
    request = store_request(user, "Alice likes green tea", new_id(), agent_id="tea-bot")
    first = await api.StoreMemory(request)
    again = await api.StoreMemory(request)
    assert again.memory == first.memory
    assert await contents(api, user) == ["Alice likes green tea"]


async def test_the_same_id_with_other_content_is_refused(api: "MemoryServiceAsyncStub", user: str) -> None:
    memory_id = new_id()
    await api.StoreMemory(store_request(user, "first", memory_id))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await api.StoreMemory(store_request(user, "second", memory_id))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.ALREADY_EXISTS, "ID_TAKEN")
    assert await contents(api, user) == ["first"]


async def test_ids_are_unique_per_user_only(api: "MemoryServiceAsyncStub", user: str) -> None:
    memory_id = new_id()
    await api.StoreMemory(store_request(user, "mine", memory_id))
    await api.StoreMemory(store_request(user + "-other", "theirs", memory_id))
    assert await contents(api, user) == ["mine"]
    with pytest.raises(grpc.aio.AioRpcError) as ambiguous:
        await api.GetMemory(pb.GetMemoryRequest(id=memory_id))
    assert (ambiguous.value.code(), reason_of(ambiguous.value)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "AMBIGUOUS",
    )


async def test_twenty_callers_racing_with_one_request_store_it_once(api: "MemoryServiceAsyncStub", user: str) -> None:
    request = store_request(user, "once", new_id())
    answers = await asyncio.gather(*(api.StoreMemory(request) for _ in range(20)))
    assert {answer.memory.SerializeToString() for answer in answers} == {answers[0].memory.SerializeToString()}
    assert await contents(api, user) == ["once"]


async def test_of_callers_racing_with_one_id_and_different_contents_one_wins(
    api: "MemoryServiceAsyncStub", user: str
) -> None:
    memory_id = new_id()
    outcomes = await asyncio.gather(
        *(api.StoreMemory(store_request(user, f"content {n}", memory_id)) for n in range(10)), return_exceptions=True
    )
    won = [outcome.memory.content for outcome in outcomes if isinstance(outcome, pb.StoreMemoryResponse)]
    lost = [outcome.code() for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(won) == 1
    assert lost == [grpc.StatusCode.ALREADY_EXISTS] * 9
    assert await contents(api, user) == won


async def test_a_late_retry_of_a_store_neither_conflicts_with_a_delete_nor_resurrects(
    api: "MemoryServiceAsyncStub", user: str
) -> None:
    memory_id = new_id()
    request = store_request(user, "to be deleted", memory_id)
    first = await api.StoreMemory(request)
    deleted = await api.DeleteMemory(pb.DeleteMemoryRequest(id=memory_id, user_id=user))
    assert deleted.deleted
    retried = await api.StoreMemory(request)
    assert retried.memory == first.memory
    assert await contents(api, user) == []
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await api.StoreMemory(store_request(user, "another", memory_id))
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_a_store_racing_with_the_delete_of_its_memory_never_resurrects_it(
    api: "MemoryServiceAsyncStub", user: str
) -> None:
    for n in range(20):
        request = store_request(user, f"raced {n}", new_id())
        await api.StoreMemory(request)
        delete = pb.DeleteMemoryRequest(id=request.memory.id, user_id=user)
        await asyncio.gather(api.DeleteMemory(delete), *(api.StoreMemory(request) for _ in range(3)))
    assert await contents(api, user) == []


async def test_a_deleted_memorys_text_is_in_no_table(
    api: "MemoryServiceAsyncStub", cluster: LocalCluster, user: str
) -> None:
    marker = f"secret {uuid.uuid4()}"
    stored = await api.StoreMemory(
        store_request(user, marker, new_id(), agent_id=marker, session_id=marker, metadata={"where": marker})
    )
    await api.DeleteMemory(pb.DeleteMemoryRequest(id=stored.memory.id, user_id=user))
    topology = await topology_of(cluster.catalog_dsn())
    shard = topology.owner(user_slot(user))
    async with database(cluster.shard_dsn(shard.shard_id, owner=True)) as connection:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables:
            rows = await connection.fetch(f'SELECT t::text AS row FROM "{table}" AS t')
            assert not [row["row"] for row in rows if marker in row["row"]], table


async def test_deleting_with_one_request_id_has_one_answer(api: "MemoryServiceAsyncStub", user: str) -> None:
    stored = await api.StoreMemory(store_request(user, "deleted once"))
    request = pb.DeleteMemoryRequest(id=stored.memory.id, user_id=user, request_id="delete-1")
    assert (await api.DeleteMemory(request)).deleted
    assert (await api.DeleteMemory(request)).deleted
    request.request_id = "delete-2"
    assert not (await api.DeleteMemory(request)).deleted


async def test_a_request_id_used_for_another_delete_deletes_nothing(api: "MemoryServiceAsyncStub", user: str) -> None:
    one, two = [await api.StoreMemory(store_request(user, text)) for text in ("one", "two")]
    await api.DeleteMemory(pb.DeleteMemoryRequest(id=one.memory.id, user_id=user, request_id="r"))
    with pytest.raises(grpc.aio.AioRpcError) as reused:
        await api.DeleteMemory(pb.DeleteMemoryRequest(id=two.memory.id, user_id=user, request_id="r"))
    assert (reason_of(reused.value), fields_of(reused.value)) == ("REQUEST_ID_REUSED", ["request_id"])
    assert await contents(api, user) == ["two"]


@pytest.mark.parametrize("suffix", ["x", "%", "_", "\u00e9", "e\u0301", " "])
async def test_users_with_similar_names_share_nothing(api: "MemoryServiceAsyncStub", user: str, suffix: str) -> None:
    names = [user, user + suffix, user.upper(), "%" + user[1:] + suffix, user[:-1] + "_" + suffix]
    stored = {name: await api.StoreMemory(store_request(name, f"memory of {name}", agent_id=user)) for name in names}
    for name in names:
        assert await contents(api, name) == [f"memory of {name}"]
        found = await api.SearchMemories(pb.SearchMemoriesRequest(user_id=name, query="memory", limit=100))
        assert {result.memory.user_id for result in found.results} == {name}
        for other in set(names) - {name}:
            with pytest.raises(grpc.aio.AioRpcError) as missing:
                await api.GetMemory(pb.GetMemoryRequest(id=stored[other].memory.id, user_id=name))
            assert missing.value.code() is grpc.StatusCode.NOT_FOUND
            theirs = pb.DeleteMemoryRequest(id=stored[other].memory.id, user_id=name)
            assert not (await api.DeleteMemory(theirs)).deleted


async def test_all_that_was_stored_comes_back(api: "MemoryServiceAsyncStub", user: str) -> None:
    request = store_request(
        user,
        "line one\nline two \u00e9 \U0001f375 \u202e",
        new_id(),
        agent_id="agent",
        session_id="session",
        type=pb.MEMORY_TYPE_PROCEDURAL,
        importance=0.0,
        embedding=[0.5] * 256,
        metadata={"n": 1.5, "list": [1, None, {"x": True}], "text": "\u00e9"},
    )
    request.memory.expire_time.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    await api.StoreMemory(request)
    got = await api.GetMemory(pb.GetMemoryRequest(id=request.memory.id, user_id=user, include_embedding=True))
    expected = pb.Memory()
    expected.CopyFrom(request.memory)
    expected.embedding_model = got.memory.embedding_model
    expected.embedding_state = pb.EMBEDDING_STATE_READY
    expected.version = 1
    expected.create_time.CopyFrom(got.memory.create_time)
    expected.update_time.CopyFrom(got.memory.create_time)
    expected.expire_time.nanos = got.memory.expire_time.nanos  # Kept to the microsecond.
    assert got.memory == expected
    assert abs(got.memory.create_time.seconds - datetime.now(UTC).timestamp()) < 60


async def test_an_expired_memory_is_in_no_read(api: "MemoryServiceAsyncStub", user: str) -> None:
    soon = timestamp_pb2.Timestamp()
    soon.FromDatetime(datetime.now(UTC) + timedelta(seconds=5))
    stored = await api.StoreMemory(store_request(user, "short-lived", expire_time=soon))
    assert await contents(api, user) == ["short-lived"]

    async def expired() -> bool:
        return await contents(api, user) == []

    await eventually(expired, within_s=10)
    found = await api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="short-lived"))
    assert not found.results
    for whose in (user, ""):
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id, user_id=whose))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_expiry_in_the_past_is_refused_but_a_repeated_store_is_the_same_success_after_it(
    api: "MemoryServiceAsyncStub", user: str
) -> None:
    past = timestamp_pb2.Timestamp(seconds=1_000_000_000)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await api.StoreMemory(store_request(user, "too late", expire_time=past))
    assert (reason_of(refused.value), fields_of(refused.value)) == ("EXPIRE_TIME_IN_PAST", ["memory.expire_time"])
    soon = timestamp_pb2.Timestamp()
    soon.FromDatetime(datetime.now(UTC) + timedelta(seconds=5))
    request = store_request(user, "in time", new_id(), expire_time=soon)
    first = await api.StoreMemory(request)

    async def expired() -> bool:
        return await contents(api, user) == []

    await eventually(expired)
    assert (await api.StoreMemory(request)).memory == first.memory


@pytest.mark.parametrize("nanos", [0, 999_998_000, 999_999_000, 999_999_999])
async def test_the_last_moment_of_the_calendar_is_an_expiry_like_any_other(
    api: "MemoryServiceAsyncStub", user: str, nanos: int
) -> None:
    """asyncpg stores datetime.max as infinity, and reads that as something else."""
    request = store_request(
        user, "for ever", new_id(), expire_time=timestamp_pb2.Timestamp(seconds=253_402_300_799, nanos=nanos)
    )
    await api.StoreMemory(request)
    await api.StoreMemory(request)
    assert await contents(api, user) == ["for ever"]
    found = await api.SearchMemories(pb.SearchMemoriesRequest(query="for ever", require_all_shards=True))
    assert found.results


async def test_a_page_of_large_memories_ends_early_and_loses_none(api: "MemoryServiceAsyncStub", user: str) -> None:
    large = "x" * 60_000
    ids = {(await api.StoreMemory(store_request(user, f"{n} {large}", embedding=[1.0] * 256))).memory.id
           for n in range(70)}  # fmt: skip
    seen: list[str] = []
    token, pages = "", 0
    while pages == 0 or token:
        # A client with gRPC's default limit of 4 MiB must be able to read every page.
        page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000, page_token=token))
        seen += [memory.id for memory in page.memories]
        token, pages = page.next_page_token, pages + 1
    assert pages >= 2
    assert sorted(seen) == sorted(ids)


async def test_a_page_token_of_another_listing_or_made_up_is_refused(api: "MemoryServiceAsyncStub", user: str) -> None:
    for n in range(3):
        await api.StoreMemory(store_request(user, f"memory {n}"))
    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1))
    for request in (
        pb.ListMemoriesRequest(user_id=user + "-other", page_token=page.next_page_token),
        pb.ListMemoriesRequest(user_id=user, page_token=page.next_page_token, include_embedding=True),
        pb.ListMemoriesRequest(user_id=user, page_token="made up"),
        pb.ListMemoriesRequest(user_id=user, page_token=page.next_page_token[:-4] + "AAAA"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api.ListMemories(request)
        assert (reason_of(refused.value), fields_of(refused.value)) == ("BAD_PAGE_TOKEN", ["page_token"])


async def test_a_search_by_text_prefers_what_means_the_same(api: "MemoryServiceAsyncStub", user: str) -> None:
    for text in ("The cat sleeps on the sofa", "Our flight to Lisbon leaves at noon", "She paints in oil"):
        await api.StoreMemory(store_request(user, text))
    found = await api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="When does the plane leave?"))
    assert found.results[0].memory.content == "Our flight to Lisbon leaves at noon"
    assert [result.score for result in found.results] == sorted((r.score for r in found.results), reverse=True)
    assert found.score_kind == pb.SCORE_KIND_COSINE
    assert list(found.report.served_by) == ["primary"]
    assert (found.report.shards.total, found.report.shards.succeeded) == (1, 1)


@pytest.mark.parametrize(
    ("rpc", "request_"),
    [
        ("SearchMemories", pb.SearchMemoriesRequest(query="x", mode=pb.SEARCH_MODE_HYBRID)),
    ],
)
async def test_what_is_not_offered_yet_says_so(api: "MemoryServiceAsyncStub", rpc: str, request_: object) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(api, rpc)(request_)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert reason_of(refused.value)
