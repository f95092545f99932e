"""Whatever is wrong with a request is INVALID_ARGUMENT, with its field and a reason, and changes nothing."""

import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2, status_pb2

from memshard.internal.v1 import tokens_pb2
from memshard.v1 import memory_pb2 as pb
from router.tokens import Tokens
from tests.support.bad_requests import BAD_MEMORIES, BadMemory, Row, World, rows
from tests.support.cluster import LocalCluster
from tests.support.wire import fields_of, reason_of, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
_RPCS = [method.name for method in _SERVICE.methods]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(api: "MemoryServiceAsyncStub") -> World:
    """A user with two memories, and the token of the second page."""
    user = f"user-{uuid.uuid4()}"
    stored = [await api.StoreMemory(store_request(user, f"likes tea {n}")) for n in range(2)]
    listing = pb.ListMemoriesRequest(user_id=user, page_size=1)
    page = await api.ListMemories(listing)
    foreign = Tokens(b"k" * 32).next_page(listing, tokens_pb2.PageToken())
    return World(user, stored[0].memory.id, page.next_page_token, foreign)


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def nothing_changed(api: "MemoryServiceAsyncStub", world: World) -> AsyncIterator[None]:
    """No test here leaves anything behind in the world's memories."""
    before = await api.ListMemories(pb.ListMemoriesRequest(user_id=world.user))
    yield
    after = await api.ListMemories(pb.ListMemoriesRequest(user_id=world.user))
    assert list(after.memories) == list(before.memories)


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.rpc}: {row.name}") for row in rows()])
async def test_a_bad_request_is_refused_with_its_field_and_reason(
    api: "MemoryServiceAsyncStub", world: World, row: Row
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(api, row.rpc)(row.request(world), timeout=10)
    assert (refused.value.code(), fields_of(refused.value), reason_of(refused.value)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        [row.field],
        row.reason,
    )


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in BAD_MEMORIES])
async def test_a_bad_item_of_a_batch_is_refused_alone(api: "MemoryServiceAsyncStub", user: str, bad: BadMemory) -> None:
    memories = [pb.Memory(user_id=user, content=f"likes tea {n}", id=str(uuid.uuid4())) for n in range(5)]
    memories[3] = bad.memory(user)
    answer = await api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories), timeout=10)
    assert [result.WhichOneof("outcome") for result in answer.results] == ["id", "id", "id", "error", "id"]
    assert [result.id for result in answer.results if result.id] == [m.id for m in memories if m is not memories[3]]
    assert _told(answer.results[3].error) == (
        grpc.StatusCode.INVALID_ARGUMENT.value[0],
        [f"memories[3].{bad.field}"],
        bad.reason,
    )
    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert {memory.content for memory in page.memories} == {f"likes tea {n}" for n in (0, 1, 2, 4)}


@pytest.mark.parametrize("rpc", _RPCS)
@pytest.mark.parametrize("how", ["truncated", "garbage", "not UTF-8", "nested without end", "of a wrong wire type"])
async def test_bytes_that_are_no_request_are_refused(cluster: LocalCluster, rpc: str, how: str) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE.full_name}/{rpc}")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(_broken(rpc, how), timeout=10)
    assert (refused.value.code(), fields_of(refused.value), reason_of(refused.value)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        [],
        "MALFORMED_REQUEST",
    )


async def test_a_request_beyond_what_a_router_takes_is_refused_and_the_next_one_served(
    api: "MemoryServiceAsyncStub", world: World
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await api.StoreMemory(store_request(world.user, "x" * (17 * 1024**2)), timeout=10)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await api.GetMemory(pb.GetMemoryRequest(id=world.memory_id), timeout=10)).memory.user_id == world.user


async def test_what_is_just_within_the_bounds_is_taken(api: "MemoryServiceAsyncStub", user: str) -> None:
    deep: Any = 1
    for _ in range(7):
        deep = {"a": deep}
    request = store_request(
        user.ljust(256, "x"),
        "tea " + "x" * (64 * 1024 - 4),
        agent_id="a" * 256,
        metadata={"a": deep, "long": "x" * (31 * 1024)},
        importance=1.0,
        embedding=[65_504.0] + [6e-8] * 255,
    )
    stored = await api.StoreMemory(request, timeout=10)
    memory = request.memory
    assert (await api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id))).memory.content == memory.content
    search = pb.SearchMemoriesRequest(user_id=memory.user_id, query="x" * (64 * 1024), offset=0, limit=1000)
    search.embedding.extend(memory.embedding)
    assert len((await api.SearchMemories(search)).results) == 1


def _broken(rpc: str, how: str) -> bytes:
    """Bytes that parse as no request of this rpc. The first field of each is a string or a Memory."""
    first = _SERVICE.methods_by_name[rpc].input_type.fields_by_number[1]
    # Tag 1 of wire type 2, length-delimited, is 0x0a; of a Memory, field 1 is a string again.
    nested = first.type == FieldDescriptor.TYPE_MESSAGE
    match how:
        case "truncated":
            return b"\x0a\x7fabc"
        case "garbage":
            return b"\xff" * 64
        case "not UTF-8":
            return b"\x0a\x04\x0a\x02\xc3\x28" if nested else b"\x0a\x02\xc3\x28"
        case "nested without end":  # Groups within groups, of a field that nobody knows.
            return b"\xfb\x07" * 1000
        case _:  # A tag with a wire type that there is not.
            return b"\x0f"


def _told(status: status_pb2.Status) -> tuple[int, list[str], str]:
    """Code, fields and reason of the status of an item."""
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    assert info.domain == "memshard"
    return status.code, [violation.field for violation in bad.field_violations], info.reason
