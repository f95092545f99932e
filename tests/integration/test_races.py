"""Requests that meet in the middle: an erasure or a delete and an update, a repetition and what came since."""

import asyncio
import uuid

import grpc
import pytest
from google.protobuf import field_mask_pb2, timestamp_pb2

from memshard.v1 import memory_pb2 as pb
from tests.integration.conftest import Somewhere
from tests.support.eventually import eventually
from tests.support.wire import database, fields_of, reason_of, store_request, topology_of


def change(memory: pb.Memory, content: str) -> pb.UpdateMemoryRequest:
    return pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, user_id=memory.user_id, content=content),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
    )


async def contents(there: Somewhere, user: str) -> list[str]:
    page = await there.api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000))
    return [memory.content for memory in page.memories]


async def test_an_erasure_waits_for_an_update_under_way_and_erases_what_it_left(
    everywhere: Somewhere, user: str
) -> None:
    """The updated row is another one to a delete that has a list of rows."""
    memory = (await everywhere.api.StoreMemory(store_request(user, "before"))).memory
    for shard in (await topology_of(everywhere.cluster.catalog_dsn())).shards:
        async with database(everywhere.cluster.shard_dsn(shard.shard_id)) as connection:
            if not await connection.fetchval("SELECT count(*) FROM memories WHERE user_id = $1", user):
                continue
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("UPDATE memories SET content = 'after' WHERE id = $1", memory.id)
            erasing = asyncio.ensure_future(everywhere.api.EraseUser(pb.EraseUserRequest(user_id=user)))

            async def waits(dsn: str = everywhere.cluster.shard_dsn(shard.shard_id)) -> bool:
                async with database(dsn) as other:
                    return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await eventually(waits)
            await transaction.commit()
            assert (await erasing).memories_erased == 1
            assert not await connection.fetchval("SELECT count(*) FROM memories WHERE user_id = $1", user)
    assert await contents(everywhere, user) == []


async def test_a_delete_that_meets_an_update_leaves_no_text_in_any_version(everywhere: Somewhere, user: str) -> None:
    async def race(n: int) -> None:
        memory = (await everywhere.api.StoreMemory(store_request(user, f"first {n}"))).memory
        await asyncio.gather(
            everywhere.api.UpdateMemory(change(memory, f"second {n}")),
            everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user)),
            return_exceptions=True,
        )

    for start in range(0, 40, 8):
        await asyncio.gather(*(race(n) for n in range(start, start + 8)))
    assert await contents(everywhere, user) == []
    for shard in (await topology_of(everywhere.cluster.catalog_dsn())).shards:
        async with database(everywhere.cluster.shard_dsn(shard.shard_id)) as connection:
            left = "SELECT count(*) FROM memory_versions WHERE user_id = $1 AND content <> ''"
            assert await connection.fetchval(left, user) == 0


async def test_an_erasure_repeated_later_erases_nothing_that_came_since(everywhere: Somewhere, user: str) -> None:
    await everywhere.api.StoreMemory(store_request(user, "before"))
    erase = pb.EraseUserRequest(user_id=user, request_id="erase")
    assert (await everywhere.api.EraseUser(erase)).memories_erased == 1
    await everywhere.api.StoreMemory(store_request(user, "since"))
    assert (await everywhere.api.EraseUser(erase)).memories_erased == 1
    assert await contents(everywhere, user) == ["since"]


async def test_a_store_that_was_refused_leaves_its_id_free(everywhere: Somewhere, user: str) -> None:
    memory_id = str(uuid.uuid4())
    late = store_request(user, "too late", memory_id, expire_time=timestamp_pb2.Timestamp(seconds=1_000_000_000))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await everywhere.api.StoreMemory(late)
    assert (reason_of(refused.value), fields_of(refused.value)) == ("EXPIRE_TIME_IN_PAST", ["memory.expire_time"])
    await everywhere.api.StoreMemory(store_request(user, "in time", memory_id))
    assert await contents(everywhere, user) == ["in time"]


async def test_an_id_of_a_year_beyond_the_calendar_is_an_id_like_any_other(everywhere: Somewhere, user: str) -> None:
    memory_id = "ffffffff-ffff-7fff-bfff-ffffffffffff"
    await everywhere.api.StoreMemory(store_request(user, "far away", memory_id))
    got = await everywhere.api.GetMemory(pb.GetMemoryRequest(id=memory_id, user_id=user))
    assert got.memory.content == "far away"
    assert (await everywhere.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory_id, user_id=user))).deleted


@pytest.mark.parametrize("unit", ["a_", "x-y.", "http://a/", "1.2.", "@a.b ", "é"])
async def test_no_text_keeps_a_shard_busy(everywhere: Somewhere, user: str, unit: str) -> None:
    """PostgreSQL's parser takes 20 s for 64 KiB of "a_a_a_…", looking for an address in it."""
    text = (unit * 40_000).encode()[:60_000].decode(errors="ignore")
    request = store_request(user, text, embedding=[0.1] * 256)
    await everywhere.api.StoreMemory(request, timeout=5)
    search = pb.SearchMemoriesRequest(user_id=user, query=text, mode=pb.SEARCH_MODE_KEYWORD, limit=1)
    await everywhere.api.SearchMemories(search, timeout=5)


async def test_a_query_of_many_words_is_answered_soon(everywhere: Somewhere, user: str) -> None:
    words = " ".join(f"w{n}" for n in range(9_000))
    await everywhere.api.StoreMemory(store_request(user, words, embedding=[0.1] * 256))
    search = pb.SearchMemoriesRequest(user_id=user, query=words, mode=pb.SEARCH_MODE_KEYWORD)
    found = await everywhere.api.SearchMemories(search, timeout=5)
    assert len(found.results) == 1
