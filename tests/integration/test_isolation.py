"""No user meets another's memories, none gets fewer than there are, none gets one twice: under every placement.

Most tests are named after a bug that users of other memory stores met. What test_store.py and test_everywhere.py say of
the same is not repeated here: some names alike in lists and searches, one stranger, one deleted memory, one store.
"""

import asyncio
import unicodedata
import uuid
from collections.abc import Iterable
from typing import Any

import grpc
import pytest

from memshard.v1 import memory_pb2 as pb
from tests.integration.conftest import Somewhere
from tests.integration.test_everywhere import TYPES, contents, every_text_in_the_cluster, new_id, update_request
from tests.support.filter_model import all_of, compare, negation
from tests.support.wire import reason_of, store_request

DIMENSIONS = 256  # Of the local embedder.
LARGE = 600
MAX_USER_BYTES = 256
BATCH = 500


def alike(user: str) -> list[str]:
    """Names that a pattern, a prefix, a collation, a Unicode form, a trim or a quoting rule could take for another.

    Of LangGraph, CVE-2026-71433: a user's namespace was matched as a prefix and a pattern.
    """
    foo, letter = f"{user}-foo", f"{user}-a"
    longest = f"{user}-".ljust(MAX_USER_BYTES, "x")
    composed = f"{user}-\u00e9"
    return [
        *(user, foo, f"{foo}bar", f"{foo}/bar", f"{foo}.bar", f"{foo}:bar"),
        *(letter, f"{letter}%", f"{letter}_", f"{letter}b", f"{letter}\\%", f"%{letter}", f"{letter}*", "%" * 3 + user),
        *(user.upper(), f"{user}-A", f"{user}-\u00c9", composed, unicodedata.normalize("NFD", composed)),
        *(f"{letter} ", f" {letter}", f"{letter}\t", f"{letter}\n", f"{letter}\u00a0", f"{letter}\u200b"),
        *(f"{letter}'", f'{letter}"', f"{letter}' OR 'a'='a", f"{letter}\\", f"{letter}\\\\", f"{letter}\\'"),
        *(f"{letter}$1", f"{letter}{{}}", f"{letter}--", f"{letter};", f"{user}-\U0001f600", f"{user}-\U0001f601"),
        *(f"{user}-\u00df", f"{user}-ss", f"{user}-i", f"{user}-\u0130", f"{user}-\u0131"),
        *(longest, longest[:-1], f"{longest[:-1]}y", f"{user}-".ljust(MAX_USER_BYTES - 4, "x") + "\U0001f600"),
    ]


async def status_of(call: "grpc.aio.UnaryUnaryCall[Any, Any]") -> grpc.StatusCode:
    return await call.code()


async def store_batch(there: Somewhere, memories: Iterable[pb.Memory]) -> None:
    """All of these, of any users."""
    left = list(memories)
    for start in range(0, len(left), BATCH):
        answer = await there.api.BatchStoreMemories(
            pb.BatchStoreMemoriesRequest(memories=left[start : start + BATCH]), timeout=60
        )
        assert all(result.id for result in answer.results)


async def test_users_with_names_alike_share_nothing_foo_foobar_cve_2026_71433(everywhere: Somewhere, user: str) -> None:
    names = alike(user)
    assert len(set(names)) == len(names)
    # The one id is everybody's; of the others, everybody has one.
    shared, own = new_id(), {name: new_id() for name in names}
    word = f"word{uuid.uuid4().hex}"
    await store_batch(
        everywhere,
        (
            pb.Memory(id=memory_id, user_id=name, content=f"{word} {what} {number}", type=TYPES[number % 4])
            for number, name in enumerate(names)
            for what, memory_id in (("shared", shared), ("own", own[name]))
        ),
    )

    async def check(number: int, name: str) -> None:
        mine = {f"{word} shared {number}", f"{word} own {number}"}
        assert set(await contents(everywhere, name)) == mine, name
        for mode in (pb.SEARCH_MODE_SEMANTIC, pb.SEARCH_MODE_KEYWORD):
            request = pb.SearchMemoriesRequest(user_id=name, query=word, mode=mode, limit=100)
            found = (await everywhere.api.SearchMemories(request)).results
            assert {r.memory.content for r in found} == mine, name
            assert {r.memory.user_id for r in found} == {name}
        got = await everywhere.api.GetMemory(pb.GetMemoryRequest(id=shared, user_id=name))
        assert (got.memory.user_id, got.memory.content) == (name, f"{word} shared {number}")

    await asyncio.gather(*(check(number, name) for number, name in enumerate(names)))
    found = (await everywhere.api.SearchMemories(pb.SearchMemoriesRequest(
        query=word, mode=pb.SEARCH_MODE_KEYWORD, limit=1000, require_all_shards=True))).results  # fmt: skip
    assert sorted((r.memory.user_id, r.memory.id) for r in found) == sorted(
        (name, memory_id) for name in names for memory_id in (shared, own[name])
    )


async def test_another_users_id_is_missing_to_every_name_alike_cve_2026_71433(everywhere: Somewhere, user: str) -> None:
    names = alike(user)
    stored = [
        (await everywhere.api.StoreMemory(store_request(name, f"memory {n}", new_id(), type=TYPES[n % 4]))).memory
        for n, name in enumerate(names)
    ]

    async def meddle(name: str, memory: pb.Memory) -> None:
        api, its = everywhere.api, memory.id
        theirs = update_request(pb.Memory(id=its, user_id=name), "content", "agent_id", content="mine now")
        codes = await asyncio.gather(
            status_of(api.GetMemory(pb.GetMemoryRequest(id=its, user_id=name))),
            status_of(api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=its, user_id=name))),
            status_of(api.UpdateMemory(theirs)),
        )
        assert set(codes) == {grpc.StatusCode.NOT_FOUND}, name
        assert not (await api.DeleteMemory(pb.DeleteMemoryRequest(id=its, user_id=name))).deleted, name

    # Everybody against the first and the next one: the lists above are in the order of likeness.
    for number, name in enumerate(names):
        for memory in {stored[0].id: stored[0], stored[number - 1].id: stored[number - 1]}.values():
            if memory.user_id != name:
                await meddle(name, memory)
    for memory in stored:
        got = await everywhere.api.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=memory.user_id))
        assert got.memory == memory


async def test_changes_to_ones_own_memory_leave_those_with_its_id_and_request_id_alone(
    everywhere: Somewhere, user: str
) -> None:
    names = alike(user)
    memory_id = new_id()
    await store_batch(everywhere, (pb.Memory(id=memory_id, user_id=name, content=f"first of {name}") for name in names))
    # One request id for all: it is known within its user.
    for name in names[::2]:
        request = update_request(pb.Memory(id=memory_id, user_id=name), "content", content=f"second of {name}")
        request.request_id = "one"
        assert (await everywhere.api.UpdateMemory(request)).memory.version == 2
    for name in names[::3]:
        request_id = "two" if names.index(name) % 2 == 0 else "one"
        deleted = pb.DeleteMemoryRequest(id=memory_id, user_id=name, request_id=request_id)
        assert (await everywhere.api.DeleteMemory(deleted)).deleted
    for name in names[1::3]:
        erased = await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=name, request_id="erase"))
        assert erased.memories_erased == 1, name
    for number, name in enumerate(names):
        if number % 3 == 2:
            word, version = ("second", 2) if number % 2 == 0 else ("first", 1)
            assert await contents(everywhere, name) == [f"{word} of {name}"]
            versions = await everywhere.api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=memory_id, user_id=name))
            assert [v.version for v in versions.versions] == list(range(version, 0, -1))
        else:
            assert await contents(everywhere, name) == []


async def test_nine_is_less_than_ten_langgraph_7684(everywhere: Somewhere, user: str) -> None:
    values: list[Any] = [-10, -9, -0.5, 0, 9, 9.5, 10, 100, 1000, "9", "10", True, None, [9], {"n": 9}]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    await store_batch(
        everywhere,
        [
            *(
                pb.Memory(user_id=user, content=f"value {v!r}", metadata={"n": v}, type=TYPES[i % 4])  # type: ignore[arg-type]
                for i, v in enumerate(values)
            ),
            pb.Memory(user_id=user, content="no value"),
        ],
    )
    everything = set(await contents(everywhere, user))
    for bound in (-9, 0, 9, 10, 100):
        below = {f"value {v!r}" for v in numbers if v < bound}
        least = {f"value {v!r}" for v in numbers if v <= bound}
        among_numbers = {f"value {v!r}" for v in numbers}
        for filter, expected in (
            (compare("metadata.n", "LT", bound), below),
            (compare("metadata.n", "LTE", bound), least),
            (compare("metadata.n", "GT", bound), among_numbers - least),
            (compare("metadata.n", "GTE", bound), among_numbers - below),
            (compare("metadata.n", "EQ", bound), least - below),
            (negation(compare("metadata.n", "LT", bound)), everything - below),
            (all_of(compare("metadata.n", "GTE", bound), compare("metadata.n", "LTE", bound)), least - below),
        ):
            assert set(await contents(everywhere, user, filter=filter)) == expected, filter
            search = pb.SearchMemoriesRequest(user_id=user, query="value", limit=100, filter=filter)
            assert {r.memory.content for r in (await everywhere.api.SearchMemories(search)).results} == expected
    as_text = await contents(everywhere, user, filter=compare("metadata.n", "LT", "9"))
    assert as_text == ["value '10'"], "text is compared as text, and with text only"


async def test_small_users_among_large_ones_get_min_of_k_and_rows_honcho_1048_mem0(
    everywhere: Somewhere, user: str
) -> None:
    near, far = [1.0] * DIMENSIONS, [-1.0] * DIMENSIONS
    word = f"word{uuid.uuid4().hex}"
    small = {f"{user}-{rows}": rows for rows in (0, 1, 3, 20)}
    large = [f"{user}-large-{n}" for n in range(2)]

    def some(name: str, rows: int, embedding: list[float], **metadata: str) -> Iterable[pb.Memory]:
        return (
            pb.Memory(user_id=name, content=f"{word} {n}", type=TYPES[n % 4], embedding=embedding, metadata=metadata)  # type: ignore[arg-type]
            for n in range(rows)
        )

    # All of the large users' is nearer to what is asked, and was there before and after.
    await store_batch(everywhere, some(large[0], LARGE, near))
    for name, rows in small.items():
        await store_batch(everywhere, some(name, rows, far, kind="rare"))
    await store_batch(everywhere, some(large[1], LARGE, near))
    await store_batch(everywhere, some(large[1], 3, far, kind="rare"))

    rare = compare("metadata.kind", "EQ", "rare")
    asked: list[tuple[str, int, pb.Filter | None]] = [
        *((name, rows, filter) for name, rows in small.items() for filter in (None, rare)),
        *((name, LARGE + extra, None) for name, extra in zip(large, (0, 3), strict=True)),
        (large[1], 3, rare),
    ]
    for name, rows, filter in asked:
        for limit in (1, 2, 10, 100, 1000):
            for how in (
                pb.SearchMemoriesRequest(embedding=near),
                pb.SearchMemoriesRequest(query=word, mode=pb.SEARCH_MODE_KEYWORD),
            ):
                request = pb.SearchMemoriesRequest(user_id=name, limit=limit, filter=filter)
                request.MergeFrom(how)
                found = (await everywhere.api.SearchMemories(request)).results
                assert len({r.memory.id for r in found}) == len(found) == min(limit, rows), request
                assert {r.memory.user_id for r in found} <= {name}
        if limit <= rows:
            continue
        page = await everywhere.api.ListMemories(pb.ListMemoriesRequest(user_id=name, page_size=limit, filter=filter))
        assert (len(page.memories), page.next_page_token) == (rows, "")
    # The rare ones of everybody, behind 1,200 that are nearer.
    everybody = pb.SearchMemoriesRequest(
        embedding=near, limit=1000, require_all_shards=True, filter=all_of(rare, compare("agent_id", "EXISTS", False))
    )
    results = (await everywhere.api.SearchMemories(everybody)).results
    assert sum(1 for r in results if r.memory.user_id.startswith(user)) == sum(small.values()) + 3
    for name in large:  # Other tests look at the same cluster.
        await everywhere.api.EraseUser(pb.EraseUserRequest(user_id=name))


async def test_deleted_and_refused_text_is_in_no_table_mem0_history(everywhere: Somewhere, user: str) -> None:
    marker = f"secret{uuid.uuid4().hex}"
    fields = {"agent_id": marker, "session_id": marker, "metadata": {marker: marker}}
    memories = [
        pb.Memory(id=new_id(), user_id=user, content=f"{marker} {n}", type=TYPES[n % 4], **fields)  # type: ignore[arg-type]
        for n in range(8)
    ]
    batch = pb.BatchStoreMemoriesRequest(memories=memories)
    await everywhere.api.BatchStoreMemories(batch)
    updates = []
    for memory in memories[::2]:
        update = update_request(memory, "content", "metadata", content=f"{marker} again", metadata={"m": marker})
        update.request_id = f"update {memory.id}"
        await everywhere.api.UpdateMemory(update)
        updates.append(update)
    assert marker in await every_text_in_the_cluster(everywhere)
    for memory in memories:
        deleted = pb.DeleteMemoryRequest(id=memory.id, user_id=user, request_id=f"delete {memory.id}")
        assert (await everywhere.api.DeleteMemory(deleted)).deleted
        assert (await everywhere.api.DeleteMemory(deleted)).deleted
    # What comes late brings nothing back.
    again = await everywhere.api.BatchStoreMemories(batch)
    assert [result.id for result in again.results] == [memory.id for memory in memories]
    for update in updates:
        assert (await everywhere.api.UpdateMemory(update)).memory.content == ""
    for memory in memories:
        assert (await everywhere.api.StoreMemory(pb.StoreMemoryRequest(memory=memory))).memory.id == memory.id
        other = store_request(user, f"{marker} other", memory.id)
        assert await status_of(everywhere.api.StoreMemory(other)) is grpc.StatusCode.ALREADY_EXISTS
        late = update_request(memory, "content", content=f"{marker} late")
        assert await status_of(everywhere.api.UpdateMemory(late)) is grpc.StatusCode.NOT_FOUND
    kept = (await everywhere.api.StoreMemory(store_request(user, "kept"))).memory
    stale = update_request(kept, "content", content=f"{marker} stale")
    stale.expected_version = 2
    assert await status_of(everywhere.api.UpdateMemory(stale)) is grpc.StatusCode.ABORTED
    assert marker not in await every_text_in_the_cluster(everywhere)
    assert await contents(everywhere, user) == ["kept"]
    word = pb.SearchMemoriesRequest(query=marker, mode=pb.SEARCH_MODE_KEYWORD, require_all_shards=True)
    assert not (await everywhere.api.SearchMemories(word)).results


async def test_retried_adds_make_no_duplicates_mem0_6515(everywhere: Somewhere, user: str) -> None:
    """Retried one by one and in batches, side by side, in another order, with ids in capitals."""
    memories = [
        pb.Memory(id=new_id(), user_id=f"{user}-{n % 3}", content=f"memory {n}", type=TYPES[n % 4]) for n in range(24)
    ]
    capitals = []
    for memory in memories:
        capital = pb.Memory()
        capital.CopyFrom(memory)
        capital.id = memory.id.upper()
        capitals.append(capital)

    async def batch(items: list[pb.Memory]) -> None:
        answer = await everywhere.api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=items))
        assert [result.error for result in answer.results if result.HasField("error")] == []
        assert [result.id for result in answer.results] == [memory.id.lower() for memory in items]

    async def one(memory: pb.Memory) -> None:
        answer = await everywhere.api.StoreMemory(pb.StoreMemoryRequest(memory=memory))
        assert (answer.memory.id, answer.memory.version) == (memory.id.lower(), 1)

    for _ in range(3):
        await asyncio.gather(
            *(batch(items) for items in (memories, memories[::-1], capitals, [*memories[::2], *capitals[::-1]])),
            *(one(memory) for memory in [*memories[::3], *capitals]),
        )
    for n in range(3):
        listed = await contents(everywhere, f"{user}-{n}")
        assert sorted(listed) == sorted(memory.content for memory in memories[n::3])
        found = await everywhere.api.SearchMemories(
            pb.SearchMemoriesRequest(user_id=f"{user}-{n}", query="memory", limit=1000)
        )
        assert sorted(r.memory.content for r in found.results) == sorted(listed)
    for memory in memories:
        whose = pb.ListMemoryVersionsRequest(id=memory.id, user_id=memory.user_id)
        assert [v.version for v in (await everywhere.api.ListMemoryVersions(whose)).versions] == [1]


async def test_a_request_id_answers_the_same_whatever_was_stored_since(everywhere: Somewhere, user: str) -> None:
    """A late retry of a delete that found nothing must not delete what came after it."""
    memory_id = new_id()
    delete = pb.DeleteMemoryRequest(id=memory_id, user_id=user, request_id="delete")
    assert not (await everywhere.api.DeleteMemory(delete)).deleted
    await everywhere.api.StoreMemory(store_request(user, "stored since", memory_id))
    assert not (await everywhere.api.DeleteMemory(delete)).deleted
    assert await contents(everywhere, user) == ["stored since"]


async def test_a_refused_store_does_not_take_its_id(everywhere: Somewhere, user: str) -> None:
    """The same id again, with the fault mended, is a new memory."""
    request = store_request(user, "in time", new_id())
    request.memory.expire_time.seconds = 1_000_000_000
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await everywhere.api.StoreMemory(request)
    assert reason_of(refused.value) == "EXPIRE_TIME_IN_PAST"
    batch = await everywhere.api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=[request.memory]))
    assert batch.results[0].HasField("error")
    request.memory.ClearField("expire_time")
    await everywhere.api.StoreMemory(request)
    assert await contents(everywhere, user) == ["in time"]


async def test_a_request_id_used_for_one_memory_is_refused_for_another(everywhere: Somewhere, user: str) -> None:
    """By this user, wherever the two memories are."""
    stored = [
        (await everywhere.api.StoreMemory(store_request(user, f"memory {n}", new_id(), type=TYPES[n % 4]))).memory
        for n in range(8)
    ]
    first = update_request(stored[0], "agent_id", agent_id="agent")
    first.request_id = "r"
    await everywhere.api.UpdateMemory(first)
    for memory in stored[1:]:
        delete = pb.DeleteMemoryRequest(id=memory.id, user_id=user, request_id="r")
        with pytest.raises(grpc.aio.AioRpcError) as reused:
            await everywhere.api.DeleteMemory(delete)
        assert reason_of(reused.value) == "REQUEST_ID_REUSED"
    assert len(await contents(everywhere, user)) == len(stored)


async def test_a_refused_request_does_not_take_its_request_id(everywhere: Somewhere, user: str) -> None:
    """It had no effect, so its id is free for the request with the fault mended."""
    memory = (await everywhere.api.StoreMemory(store_request(user, "memory", new_id()))).memory
    stale = update_request(memory, "agent_id", agent_id="agent")
    stale.request_id, stale.expected_version = "r", 7
    absent = pb.UpdateMemoryRequest(memory=pb.Memory(id=new_id(), user_id=user, agent_id="x"), request_id="r")
    absent.update_mask.paths.append("agent_id")
    for refused_request, reason in ((stale, "VERSION_MISMATCH"), (absent, "MEMORY_NOT_FOUND")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await everywhere.api.UpdateMemory(refused_request)
        assert reason_of(refused.value) == reason
    stale.expected_version = 1
    assert (await everywhere.api.UpdateMemory(stale)).memory.version == 2
    assert (await everywhere.api.UpdateMemory(stale)).memory.version == 2
