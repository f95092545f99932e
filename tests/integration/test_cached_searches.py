"""Two routers that remember search results: what they answer from there, and what makes them look again."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import memory_service, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

EVENTUAL = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)


def session(*tokens: bytes) -> pb.ReadOptions:
    return pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=tokens)


@dataclass(frozen=True)
class Pair:
    """A cluster with two routers."""

    one: "MemoryServiceAsyncStub"
    other: "MemoryServiceAsyncStub"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair() -> AsyncIterator[Pair]:
    async with LocalCluster(shards=2, routers=2) as cluster:
        host, port = cluster.address.split(":")
        async with memory_service(cluster.address) as one, memory_service(f"{host}:{int(port) + 1}") as other:
            yield Pair(one, other)


async def found(
    api: "MemoryServiceAsyncStub", user: str, read: pb.ReadOptions | None = EVENTUAL, **fields: object
) -> tuple[set[str], list[str]]:
    """What a search finds, and who says so."""
    request = pb.SearchMemoriesRequest(user_id=user, read=read, **{"query": "green tea", **fields})  # type: ignore[arg-type]
    answer = await api.SearchMemories(request)
    return {result.memory.content for result in answer.results}, list(answer.report.served_by)


async def remembered(
    api: "MemoryServiceAsyncStub", user: str, contents: set[str], read: pb.ReadOptions = EVENTUAL
) -> None:
    """Returns once a router answers from its own memory."""

    async def is_so() -> bool:
        return await found(api, user, read) == (contents, ["cache"])

    await eventually(is_so)


async def test_the_same_search_again_is_answered_from_memory(pair: Pair, user: str) -> None:
    stored = await pair.one.StoreMemory(store_request(user, "green tea", metadata={"kind": "drink"}))
    token = stored.receipt.consistency_token
    for read in (EVENTUAL, session(token)):
        await remembered(pair.one, user, {"green tea"}, read)
    request = pb.SearchMemoriesRequest(user_id=user, query="green tea")
    strong = await pair.one.SearchMemories(request)
    assert list(strong.report.served_by) == ["primary"]
    request.read.CopyFrom(EVENTUAL)

    async def from_memory() -> pb.SearchMemoriesResponse | None:
        answer = await pair.one.SearchMemories(request)
        return answer if list(answer.report.served_by) == ["cache"] else None

    again = await eventually(from_memory)
    assert again is not None
    assert (again.results, again.score_kind) == (strong.results, strong.score_kind)
    assert again.report.shards == pb.ShardSummary()


@pytest.mark.parametrize(
    "fields",
    [
        {"query": "black coffee"},
        {"mode": pb.SEARCH_MODE_KEYWORD},
        {"limit": 1},
        {"offset": 1},
        {"min_score": 0.1},
        {"include_embedding": True},
    ],
)
async def test_another_search_is_not(pair: Pair, user: str, fields: dict[str, Any]) -> None:
    await pair.one.StoreMemory(store_request(user, "green tea"))
    await remembered(pair.one, user, {"green tea"})
    assert (await found(pair.one, user, **fields))[1] == ["primary"]
    assert (await found(pair.one, f"{user}x"))[0] == set()


@pytest.mark.parametrize("write", ["store", "batch", "update", "delete", "erase"])
async def test_whatever_a_user_writes_is_found_at_once_there_and_soon_elsewhere(
    pair: Pair, user: str, write: str
) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "green tea"))).memory
    for api in (pair.one, pair.other):
        await remembered(api, user, {"green tea"})
    if write == "store":
        receipt = (await pair.one.StoreMemory(store_request(user, "green tea with mint"))).receipt
    elif write == "batch":
        batch = pb.BatchStoreMemoriesRequest(memories=[pb.Memory(user_id=user, content="green tea with mint")])
        receipt = (await pair.one.BatchStoreMemories(batch)).receipt
    elif write == "update":
        change = pb.UpdateMemoryRequest(memory=pb.Memory(id=memory.id, user_id=user, content="green tea, cold"))
        change.update_mask.paths.append("content")
        receipt = (await pair.one.UpdateMemory(change)).receipt
    elif write == "delete":
        receipt = (await pair.one.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user))).receipt
    else:
        receipt = (await pair.one.EraseUser(pb.EraseUserRequest(user_id=user))).receipt
    expected = {
        "store": {"green tea", "green tea with mint"},
        "batch": {"green tea", "green tea with mint"},
        "update": {"green tea, cold"},
    }.get(write, set())
    assert (await found(pair.one, user))[0] == expected
    assert (await found(pair.other, user, session(receipt.consistency_token)))[0] == expected
    if write == "erase":
        assert (await found(pair.other, user))[0] == expected

    async def elsewhere() -> bool:
        return (await found(pair.other, user))[0] == expected

    await eventually(elsewhere)


async def test_who_shows_a_token_finds_what_was_written(pair: Pair, user: str) -> None:
    """By turns at both routers, while others search for the same."""
    contents: set[str] = set()
    searching = True

    async def search() -> None:
        while searching:
            await found(pair.one, user)
            await found(pair.other, user)

    others = [asyncio.create_task(search()) for _ in range(3)]
    try:
        for n in range(9):
            contents.add(f"green tea {n}")
            writer, reader = (pair.one, pair.other)[:: 1 if n % 2 else -1]
            stored = await writer.StoreMemory(store_request(user, f"green tea {n}"))
            token = stored.receipt.consistency_token
            for api in (reader, writer):
                assert (await found(api, user, session(token)))[0] == contents
    finally:
        searching = False
        await asyncio.gather(*others)
