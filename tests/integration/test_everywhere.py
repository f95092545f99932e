"""The whole API under every placement, and on one shard: what it promises does not depend on where memories are."""

import asyncio
import itertools
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2, timestamp_pb2
from redis.asyncio import Redis

from common.slots import slot_of
from memshard.v1 import memory_pb2 as pb
from router.place import home_slot
from tests.integration.conftest import Somewhere
from tests.support.eventually import eventually
from tests.support.wire import database, fields_of, reason_of, store_request, topology_of

TYPES = (pb.MEMORY_TYPE_EPISODIC, pb.MEMORY_TYPE_SEMANTIC, pb.MEMORY_TYPE_PROCEDURAL, pb.MEMORY_TYPE_WORKING)


def new_id() -> str:
    return str(uuid.uuid4())


async def store_some(there: Somewhere, user: str, count: int) -> list[pb.Memory]:
    """Memories of all types and contents, so that every placement spreads them."""
    requests = [
        store_request(user, f"{user} remembers number {n}", new_id(), type=TYPES[n % 4], metadata={"n": n})
        for n in range(count)
    ]
    answers = await asyncio.gather(*(there.api.StoreMemory(request) for request in requests))
    return [answer.memory for answer in answers]


async def contents(there: Somewhere, user: str, **listing: object) -> list[str]:
    page = await there.api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000, **listing))  # type: ignore[arg-type]
    assert not page.next_page_token
    return [memory.content for memory in page.memories]


def update_request(memory: pb.Memory, *paths: str, **fields: object) -> pb.UpdateMemoryRequest:
    return pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, user_id=memory.user_id, **fields),  # type: ignore[arg-type]
        update_mask=field_mask_pb2.FieldMask(paths=paths),
    )


async def covered(call: Any) -> set[str]:
    """The shards that the token of a write's receipt covers."""
    await call
    trailers = dict(await call.trailing_metadata())
    return set(trailers["memshard-covers"].split(","))


async def every_text_in_the_cluster(there: Somewhere) -> str:
    texts: list[str] = []
    for shard in (await topology_of(there.cluster.catalog_dsn())).shards:
        async with database(there.cluster.shard_dsn(shard.shard_id, owner=True)) as connection:
            for (table,) in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
                rows = await connection.fetch(f'SELECT t::text AS row FROM "{table}" AS t')
                texts += [row["row"] for row in rows]
    return "\n".join(texts)


async def test_what_is_stored_is_fetched_listed_and_found(everywhere: Somewhere, user: str) -> None:
    stored = await store_some(everywhere, user, 12)
    for memory in stored:
        for whose in (user, ""):
            got = await everywhere.api.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=whose))
            assert got.memory == memory
    assert sorted(await contents(everywhere, user)) == sorted(memory.content for memory in stored)
    found = await everywhere.api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="number", limit=100))
    assert sorted(r.memory.id for r in found.results) == sorted(memory.id for memory in stored)
    assert not found.report.shards.failed


async def test_pages_of_any_size_show_every_memory_once_newest_first(everywhere: Somewhere, user: str) -> None:
    stored = {memory.id for memory in await store_some(everywhere, user, 23)}
    for page_size in (1, 4, 22, 23, 24):
        seen: list[pb.Memory] = []
        token = ""
        while True:
            page = await everywhere.api.ListMemories(
                pb.ListMemoriesRequest(user_id=user, page_size=page_size, page_token=token)
            )
            assert len(page.memories) <= page_size
            seen += page.memories
            token = page.next_page_token
            if not token:
                break
        assert len(seen) == len({memory.id for memory in seen})
        assert {memory.id for memory in seen} == stored
        times = [memory.create_time.ToMicroseconds() for memory in seen]
        assert times == sorted(times, reverse=True)


async def test_a_listing_during_writes_neither_repeats_nor_skips_what_was_there(
    everywhere: Somewhere, user: str
) -> None:
    """Others are stored, changed and deleted all the while, also while a page is being merged."""
    before = {memory.id for memory in await store_some(everywhere, user, 40)}
    listed = asyncio.Event()

    async def write(writer: int) -> None:
        for n in itertools.count():
            if listed.is_set():
                return
            request = store_request(user, f"meanwhile {writer} {n}", new_id(), type=TYPES[n % 4])
            memory = (await everywhere.api.StoreMemory(request)).memory
            await everywhere.api.UpdateMemory(update_request(memory, "agent_id", agent_id="agent"))
            if n % 3 == 0:
                await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user))

    async with asyncio.TaskGroup() as group:
        for writer in range(3):
            group.create_task(write(writer))
        for page_size in (1, 3, 7):
            seen: list[str] = []
            request = pb.ListMemoriesRequest(user_id=user, page_size=page_size)
            while True:
                page = await everywhere.api.ListMemories(request)
                seen += [memory.id for memory in page.memories]
                request.page_token = page.next_page_token
                if not page.next_page_token:
                    break
            assert len(seen) == len(set(seen))
            assert before <= set(seen)
        listed.set()


async def test_an_id_is_taken_once_whatever_its_content_and_type(everywhere: Somewhere, user: str) -> None:
    memory_id = new_id()
    request = store_request(user, "first", memory_id, type=pb.MEMORY_TYPE_SEMANTIC)
    first = await everywhere.api.StoreMemory(request)
    assert (await everywhere.api.StoreMemory(request)).memory == first.memory
    for other in (
        store_request(user, "second", memory_id, type=pb.MEMORY_TYPE_SEMANTIC),
        store_request(user, "first", memory_id, type=pb.MEMORY_TYPE_WORKING),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as taken:
            await everywhere.api.StoreMemory(other)
        assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert await contents(everywhere, user) == ["first"]


async def test_of_callers_racing_with_one_id_one_wins(everywhere: Somewhere, user: str) -> None:
    memory_id = new_id()
    outcomes = await asyncio.gather(
        *(
            everywhere.api.StoreMemory(store_request(user, f"content {n}", memory_id, type=TYPES[n % 4]))
            for n in range(12)
        ),
        return_exceptions=True,
    )
    won = [outcome.memory.content for outcome in outcomes if isinstance(outcome, pb.StoreMemoryResponse)]
    assert len(won) == 1
    assert await contents(everywhere, user) == won


async def test_an_update_changes_what_its_mask_names_and_keeps_the_version_before(
    everywhere: Somewhere, user: str
) -> None:
    (memory,) = await store_some(everywhere, user, 1)
    changed = await everywhere.api.UpdateMemory(
        update_request(
            memory, "content", "importance", content="quite another thing", importance=0.9, agent_id="not named"
        )
    )
    expected = pb.Memory()
    expected.CopyFrom(memory)
    expected.content, expected.version = "quite another thing", 2
    expected.importance = changed.memory.importance
    expected.update_time.CopyFrom(changed.memory.update_time)
    assert changed.memory == expected
    assert changed.memory.importance == pytest.approx(0.9)
    assert changed.memory.update_time.ToMicroseconds() > memory.update_time.ToMicroseconds()
    found = await everywhere.api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="quite another thing"))
    assert found.results[0].score > 0.99
    versions = await everywhere.api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory.id, user_id=user))
    assert [(v.version, v.content) for v in versions.versions] == [(2, "quite another thing"), (1, memory.content)]


async def test_versions_come_in_pages_newest_first(everywhere: Somewhere, user: str) -> None:
    (memory,) = await store_some(everywhere, user, 1)
    for n in range(2, 8):
        await everywhere.api.UpdateMemory(update_request(memory, "content", content=f"version {n}"))
    seen: list[int] = []
    token = ""
    while True:
        page = await everywhere.api.ListMemoryVersions(
            pb.ListMemoryVersionsRequest(id=memory.id, user_id=user, page_size=3, page_token=token)
        )
        seen += [version.version for version in page.versions]
        token = page.next_page_token
        if not token:
            break
    assert seen == [7, 6, 5, 4, 3, 2, 1]


async def test_every_field_of_the_mask_can_be_changed(everywhere: Somewhere, user: str) -> None:
    (memory,) = await store_some(everywhere, user, 1)
    later = timestamp_pb2.Timestamp()
    later.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    request = update_request(
        memory,
        *("content", "metadata", "importance", "type", "agent_id", "session_id", "embedding", "expire_time"),
        content="new", metadata={"new": [True]}, importance=1.0, type=pb.MEMORY_TYPE_WORKING, agent_id="a",
        session_id="s", embedding=[0.5] * 256, expire_time=later,
    )  # fmt: skip
    await everywhere.api.UpdateMemory(request)
    got = await everywhere.api.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=user, include_embedding=True))
    for field in ("content", "metadata", "importance", "type", "agent_id", "session_id", "embedding"):
        assert getattr(got.memory, field) == getattr(request.memory, field), field
    assert got.memory.HasField("expire_time")
    cleared = await everywhere.api.UpdateMemory(update_request(memory, "expire_time", "metadata", "agent_id"))
    assert not cleared.memory.HasField("expire_time")
    assert (cleared.memory.agent_id, dict(cleared.memory.metadata)) == ("", {})
    assert cleared.memory.content == "new"


async def test_the_same_request_id_has_one_effect_and_the_same_answer(everywhere: Somewhere, user: str) -> None:
    (memory,) = await store_some(everywhere, user, 1)
    request = update_request(memory, "content", content="once")
    request.request_id = "update-1"
    answers = await asyncio.gather(*(everywhere.api.UpdateMemory(request) for _ in range(8)))
    assert {answer.memory.version for answer in answers} == {2}
    await everywhere.api.UpdateMemory(update_request(memory, "content", content="twice"))
    again = await everywhere.api.UpdateMemory(request)
    assert (again.memory.version, again.memory.content) == (2, "once")
    assert await contents(everywhere, user) == ["twice"]
    request.memory.content = "something else"
    with pytest.raises(grpc.aio.AioRpcError) as reused:
        await everywhere.api.UpdateMemory(request)
    assert (reason_of(reused.value), fields_of(reused.value)) == ("REQUEST_ID_REUSED", ["request_id"])


async def test_a_receipt_covers_the_claims_of_ids_and_of_request_ids_too(everywhere: Somewhere, user: str) -> None:
    topology = await topology_of(everywhere.cluster.catalog_dsn())
    claimed = everywhere.placement in ("content_hash", "memory_type")
    requests = [store_request(user, f"number {n}", new_id(), type=TYPES[n % 4]) for n in range(8)]
    for request in requests:
        if claimed:
            home = topology.owner(home_slot(user, request.memory.id)).shard_id
            assert home in await covered(everywhere.api.StoreMemory(request))
        else:
            await everywhere.api.StoreMemory(request)
        delete = pb.DeleteMemoryRequest(id=request.memory.id, user_id=user, request_id=request.memory.id)
        # Under placement by user, the effect itself is in that slot.
        assert topology.owner(slot_of(user.encode())).shard_id in await covered(everywhere.api.DeleteMemory(delete))
    batch = pb.BatchStoreMemoriesRequest(memories=[store_request(user, "the same", new_id()).memory for _ in range(20)])
    homes = {topology.owner(home_slot(user, memory.id)).shard_id for memory in batch.memories} if claimed else set()
    assert homes <= await covered(everywhere.api.BatchStoreMemories(batch))


async def test_of_updates_racing_with_one_expected_version_one_wins(everywhere: Somewhere, user: str) -> None:
    (memory,) = await store_some(everywhere, user, 1)

    async def change(n: int) -> str:
        request = update_request(memory, "content", content=f"change {n}")
        request.expected_version = 1
        try:
            return (await everywhere.api.UpdateMemory(request)).memory.content
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {reason_of(error)}"

    outcomes = await asyncio.gather(*(change(n) for n in range(8)))
    assert outcomes.count("ABORTED VERSION_MISMATCH") == 7
    assert await contents(everywhere, user) == [next(o for o in outcomes if not o.startswith("ABORTED"))]


async def test_a_late_retry_after_an_update_and_after_a_delete_changes_nothing(
    everywhere: Somewhere, user: str
) -> None:
    request = store_request(user, "first", new_id())
    memory = (await everywhere.api.StoreMemory(request)).memory
    update = update_request(memory, "content", content="second")
    update.request_id = "u"
    await everywhere.api.UpdateMemory(update)
    await everywhere.api.StoreMemory(request)
    assert await contents(everywhere, user) == ["second"]
    await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user))
    await everywhere.api.StoreMemory(request)
    assert (await everywhere.api.UpdateMemory(update)).memory.version == 2
    assert await contents(everywhere, user) == []
    fresh = update_request(memory, "content", content="third")
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await everywhere.api.UpdateMemory(fresh)
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND


async def test_another_users_memory_is_as_good_as_missing(everywhere: Somewhere, user: str) -> None:
    (memory,) = await store_some(everywhere, user, 1)
    stranger = pb.Memory(id=memory.id, user_id=f"{user}-2")
    with pytest.raises(grpc.aio.AioRpcError) as update:
        await everywhere.api.UpdateMemory(update_request(stranger, "content", content="mine now"))
    with pytest.raises(grpc.aio.AioRpcError) as versions:
        await everywhere.api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory.id, user_id=stranger.user_id))
    with pytest.raises(grpc.aio.AioRpcError) as get:
        await everywhere.api.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=stranger.user_id))
    assert {e.value.code() for e in (update, versions, get)} == {grpc.StatusCode.NOT_FOUND}
    delete = await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=stranger.user_id))
    assert not delete.deleted
    assert await contents(everywhere, user) == [memory.content]


async def test_a_deleted_memorys_text_is_in_no_table_nor_are_its_versions(everywhere: Somewhere, user: str) -> None:
    marker = f"secret{uuid.uuid4().hex}"
    memory = (
        await everywhere.api.StoreMemory(
            store_request(user, f"{marker} one", agent_id=marker, session_id=marker, metadata={"m": marker})
        )
    ).memory
    for n in range(3):
        await everywhere.api.UpdateMemory(update_request(memory, "content", content=f"{marker} {n}"))
    assert marker in await every_text_in_the_cluster(everywhere)
    await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user))
    assert marker not in await every_text_in_the_cluster(everywhere)
    versions = await everywhere.api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory.id, user_id=user))
    assert [(v.version, v.content) for v in versions.versions] == [(4, ""), (3, ""), (2, ""), (1, "")]


async def test_erasing_a_user_leaves_nothing_of_them_anywhere(everywhere: Somewhere, user: str) -> None:
    stored = await store_some(everywhere, user, 9)
    for memory in stored[:4]:
        await everywhere.api.UpdateMemory(update_request(memory, "content", content=f"{user} again"))
    deleted = pb.DeleteMemoryRequest(id=stored[0].id, user_id=user, request_id=f"{user} deletes")
    await everywhere.api.DeleteMemory(deleted)
    others = await store_some(everywhere, f"{user}-other", 3)
    erased = await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=user, request_id="erase-1"))
    # The deleted one was gone before; its emptied versions, one more with the deletion, were still kept.
    assert (erased.memories_erased, erased.versions_erased) == (8, 5)
    assert erased.receipt.consistency_token
    text = (await every_text_in_the_cluster(everywhere)).replace(f"{user}-other", "")
    assert user not in text
    assert not any(memory.id in text for memory in stored)
    redis = Redis.from_url(everywhere.cluster.redis_url())
    assert not {key async for key in redis.scan_iter()} & {f"loc:{memory.id}".encode() for memory in stored}
    await redis.aclose()
    assert await contents(everywhere, user) == []
    found = await everywhere.api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="remembers"))
    assert not found.results
    for memory in stored:
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await everywhere.api.GetMemory(pb.GetMemoryRequest(id=memory.id))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(await contents(everywhere, f"{user}-other")) == len(others)
    again = await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=user, request_id="erase-1"))
    assert (again.memories_erased, again.versions_erased) == (8, 5)
    nothing = await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=user, request_id="erase-2"))
    assert (nothing.memories_erased, nothing.versions_erased) == (0, 0)


async def test_a_batch_stores_each_item_once_with_an_outcome_of_its_own(everywhere: Somewhere, user: str) -> None:
    users = [f"{user}-{n % 5}" for n in range(60)]
    memories = [
        pb.Memory(id=new_id(), user_id=whose, content=f"item {n}", type=TYPES[n % 4]) for n, whose in enumerate(users)
    ]
    # Half of it was stored before; one is bad; one takes another's id; one comes twice.
    for memory in memories[::2]:
        await everywhere.api.StoreMemory(pb.StoreMemoryRequest(memory=memory))
    bad = pb.Memory(user_id=user, content="")
    conflict = pb.Memory(id=memories[0].id, user_id=memories[0].user_id, content="not item 0")
    request = pb.BatchStoreMemoriesRequest(memories=[*memories, bad, conflict, memories[1]])
    for _ in range(2):
        answer = await everywhere.api.BatchStoreMemories(request)
        assert [result.id for result in answer.results[:60]] == [memory.id for memory in memories]
        assert answer.results[60].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert "memories[60].content" in answer.results[60].error.message
        assert answer.results[61].error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
        assert answer.results[62].id == memories[1].id
        assert answer.receipt.consistency_token
    listed = [content for whose in sorted(set(users)) for content in await contents(everywhere, whose)]
    assert sorted(listed) == sorted(memory.content for memory in memories)


async def test_a_batch_of_500_items_and_8_mib_is_stored_whole_and_one_byte_more_is_refused(
    everywhere: Somewhere, user: str
) -> None:
    count, most_bytes = 500, 8 * 1024 * 1024
    text = "a longer text of several words, again and again; " * 340
    batch = pb.BatchStoreMemoriesRequest(
        memories=[
            pb.Memory(
                id=new_id(), user_id=user, content=f"{n:03} {text}"[:15_600], type=TYPES[n % 4], embedding=[n] * 256
            )
            for n in range(1, count + 1)
        ]
    )
    last = batch.memories[-1]
    last.content += "x" * (most_bytes - batch.ByteSize())
    # Lengths of more digits take more bytes.
    last.content = last.content[: len(last.content) + most_bytes - batch.ByteSize()]
    assert (len(batch.memories), batch.ByteSize()) == (count, most_bytes)
    answer = await everywhere.api.BatchStoreMemories(batch, timeout=60)
    assert [result.id for result in answer.results] == [memory.id for memory in batch.memories]
    seen: dict[str, str] = {}
    request = pb.ListMemoriesRequest(user_id=user, page_size=1000)
    while not seen or request.page_token:
        page = await everywhere.api.ListMemories(request)
        seen |= {memory.id: memory.content for memory in page.memories}
        request.page_token = page.next_page_token
    assert seen == {memory.id: memory.content for memory in batch.memories}
    last.content += "x"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await everywhere.api.BatchStoreMemories(batch, timeout=60)
    assert (reason_of(refused.value), fields_of(refused.value)) == ("TOO_LARGE", ["memories"])
    await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=user))  # Other tests look at the same cluster.


async def test_filters_hold_in_lists_and_in_searches_and_keep_the_order(everywhere: Somewhere, user: str) -> None:
    await store_some(everywhere, user, 20)
    below_ten = pb.Filter(
        comparison=pb.Comparison(field="metadata.n", operator=pb.OPERATOR_LT, value={"number_value": 10})  # type: ignore[arg-type]
    )
    expected = sorted(f"{user} remembers number {n}" for n in range(10))
    assert sorted(await contents(everywhere, user, filter=below_ten)) == expected
    for mode in (pb.SEARCH_MODE_SEMANTIC, pb.SEARCH_MODE_KEYWORD):
        search = pb.SearchMemoriesRequest(user_id=user, query="remembers", limit=100, mode=mode)
        unfiltered = [r.memory.id for r in (await everywhere.api.SearchMemories(search)).results]
        search.filter.CopyFrom(below_ten)
        filtered = (await everywhere.api.SearchMemories(search)).results
        assert sorted(r.memory.content for r in filtered) == expected
        assert [r.memory.id for r in filtered] == [i for i in unfiltered if i in {r.memory.id for r in filtered}]


async def test_keyword_search_finds_words_and_ranks_them(everywhere: Somewhere, user: str) -> None:
    for text in (
        "The violin teacher lives near the station",
        "She plays violins",
        "Tea with milk",
        "O'Brien & (sons) :*",
    ):
        await everywhere.api.StoreMemory(store_request(user, text))
    search = pb.SearchMemoriesRequest(user_id=user, mode=pb.SEARCH_MODE_KEYWORD, query="violin teachers")
    found = await everywhere.api.SearchMemories(search)
    # English: violins is violin, teachers is teacher; more words are better.
    assert [r.memory.content for r in found.results] == [
        "The violin teacher lives near the station",
        "She plays violins",
    ]
    assert found.score_kind == pb.SCORE_KIND_TEXT_RANK
    assert found.results[0].score > found.results[1].score > 0
    for query in ("the", "zzz", "&|!():*'\\\\", "''); DROP TABLE memories; --"):
        search.query = query
        assert not (await everywhere.api.SearchMemories(search)).results
    search.query = "o'brien (sons) & :*"
    assert [r.memory.content for r in (await everywhere.api.SearchMemories(search)).results] == ["O'Brien & (sons) :*"]


async def test_keyword_search_over_all_users_names_whose_it_is(everywhere: Somewhere, user: str) -> None:
    word = f"word{uuid.uuid4().hex}"
    for n in range(3):
        await everywhere.api.StoreMemory(store_request(f"{user}-{n}", f"{word} of {n}"))
    found = await everywhere.api.SearchMemories(
        pb.SearchMemoriesRequest(query=word, mode=pb.SEARCH_MODE_KEYWORD, require_all_shards=True)
    )
    assert {r.memory.user_id for r in found.results} == {f"{user}-{n}" for n in range(3)}


async def test_an_expired_memory_has_no_versions_either(everywhere: Somewhere, user: str) -> None:
    soon = timestamp_pb2.Timestamp()
    soon.FromDatetime(datetime.now(UTC) + timedelta(seconds=5))
    memory = (await everywhere.api.StoreMemory(store_request(user, "short-lived", expire_time=soon))).memory
    await everywhere.api.UpdateMemory(update_request(memory, "content", content="still short-lived"))

    async def gone() -> bool:
        return await contents(everywhere, user) == []

    await eventually(gone)
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await everywhere.api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory.id, user_id=user))
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await everywhere.api.UpdateMemory(update_request(memory, "content", content="too late"))
    assert late.value.code() is grpc.StatusCode.NOT_FOUND
