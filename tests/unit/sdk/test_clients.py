"""Both clients against a real server in this process: retries, deadlines, pages, closing."""

import asyncio
import inspect
import random
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_status import rpc_status

from memshard import (
    AlreadyExists,
    AsyncMemoryClient,
    Cancelled,
    DeadlineExceeded,
    DegradationLevel,
    GetResult,
    MemoryClient,
    MemshardError,
    NewMemory,
    SearchMode,
    Unavailable,
    Unimplemented,
    VersionMismatch,
)
from memshard.filters import field
from memshard.v1 import memory_pb2 as pb
from tests.unit.sdk.server import Handler, info, serving, status


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


class _FailsFirst:
    """A store that is UNAVAILABLE for its first calls."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.ids: list[str] = []

    def __call__(self, request: pb.StoreMemoryRequest, context: grpc.ServicerContext) -> pb.StoreMemoryResponse:
        self.ids.append(request.memory.id)
        if len(self.ids) <= self.failures:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return pb.StoreMemoryResponse(memory=request.memory)


def test_store_is_retried_once_with_the_same_id() -> None:
    store = _FailsFirst(1)
    with serving(StoreMemory=store) as address, MemoryClient(address) as client:
        result = client.store("alice", "likes tea")
    assert store.ids == [result.memory.id] * 2


async def test_async_store_is_retried_once_with_the_same_id() -> None:
    store = _FailsFirst(1)
    with serving(StoreMemory=store) as address:
        async with AsyncMemoryClient(address) as client:
            result = await client.store("alice", "likes tea")
    assert store.ids == [result.memory.id] * 2


def test_second_failure_is_final() -> None:
    store = _FailsFirst(2)
    with (
        serving(StoreMemory=store) as address,
        MemoryClient(address) as client,
        pytest.raises(Unavailable, match="not now"),
    ):
        client.store("alice", "likes tea")
    assert len(store.ids) == 2


def test_retries_stop_when_the_token_bucket_is_half_empty() -> None:
    store = _FailsFirst(1_000)
    with serving(StoreMemory=store) as address, MemoryClient(address) as client:
        for _ in range(120):
            with pytest.raises(Unavailable):
                client.store("alice", "likes tea")
    # 100 tokens, one for each failure, none retried below half: some fifty retries, and then no more.
    assert 140 < len(store.ids) < 175


def test_nothing_but_unavailable_is_retried() -> None:
    calls: list[str] = []

    def taken(request: pb.StoreMemoryRequest, context: grpc.ServicerContext) -> pb.StoreMemoryResponse:
        calls.append(request.memory.id)
        context.abort_with_status(
            rpc_status.to_status(status(grpc.StatusCode.ALREADY_EXISTS, "taken: 茶", info("ID_TAKEN")))
        )
        raise AssertionError("abort raises")

    with (
        serving(StoreMemory=taken) as address,
        MemoryClient(address) as client,
        pytest.raises(AlreadyExists) as caught,
    ):
        client.store("alice", "likes tea")
    assert len(calls) == 1
    assert (caught.value.reason, caught.value.message) == ("ID_TAKEN", "taken: 茶")


def test_delete_is_retried_with_the_same_request_id() -> None:
    requests: list[str] = []

    def delete(request: pb.DeleteMemoryRequest, context: grpc.ServicerContext) -> pb.DeleteMemoryResponse:
        requests.append(request.request_id)
        if len(requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return pb.DeleteMemoryResponse(deleted=True)

    with serving(DeleteMemory=delete) as address, MemoryClient(address) as client:
        assert client.delete("alice", "some-id")
    assert len(requests) == 2
    assert len(set(requests)) == 1


def test_every_write_is_retried_as_the_same_request() -> None:
    seen: dict[str, list[bytes]] = {}

    def fails_first(name: str, answer: Callable[[Any], Message]) -> Handler:
        def handle(request: Any, context: grpc.ServicerContext) -> Message:
            attempts = seen.setdefault(name, [])
            attempts.append(request.SerializeToString(deterministic=True))
            if len(attempts) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            return answer(request)

        return handle

    def stored(request: pb.BatchStoreMemoriesRequest) -> pb.BatchStoreMemoriesResponse:
        return pb.BatchStoreMemoriesResponse(results=[pb.BatchStoreResult(id=m.id) for m in request.memories])

    with (
        serving(
            UpdateMemory=fails_first("update", lambda request: pb.UpdateMemoryResponse(memory=request.memory)),
            BatchStoreMemories=fails_first("batch", stored),
            EraseUser=fails_first("erase", lambda _: pb.EraseUserResponse(memories_erased=3, versions_erased=4)),
        ) as address,
        MemoryClient(address) as client,
    ):
        assert client.update("alice", "some-id", content="likes coffee").memory.content == "likes coffee"
        assert not client.store_many(NewMemory("alice", f"memory {n}") for n in range(3)).failed
        erased = client.erase_user("alice")
    assert (erased.memories_erased, erased.versions_erased) == (3, 4)
    assert {name: (len(attempts), len(set(attempts))) for name, attempts in seen.items()} == {
        "update": (2, 1),
        "batch": (2, 1),
        "erase": (2, 1),
    }


async def test_async_writes_answer_like_the_blocking_ones() -> None:
    def update(request: pb.UpdateMemoryRequest, context: grpc.ServicerContext) -> pb.UpdateMemoryResponse:
        return pb.UpdateMemoryResponse(memory=pb.Memory(id=request.memory.id, version=request.expected_version + 1))

    def batch(request: pb.BatchStoreMemoriesRequest, context: grpc.ServicerContext) -> pb.BatchStoreMemoriesResponse:
        return pb.BatchStoreMemoriesResponse(results=[pb.BatchStoreResult(id=m.id) for m in request.memories])

    def erase(request: pb.EraseUserRequest, context: grpc.ServicerContext) -> pb.EraseUserResponse:
        return pb.EraseUserResponse(memories_erased=1)

    with serving(UpdateMemory=update, BatchStoreMemories=batch, EraseUser=erase) as address:
        async with AsyncMemoryClient(address) as client:
            updated = await client.update("alice", "some-id", importance=1, expected_version=4)
            stored = await client.store_many([NewMemory("alice", "a", id="1"), NewMemory("bob", "b", id="2")])
            erased = await client.erase_user("alice", request_id="mine")
    assert updated.memory.version == 5
    assert [outcome.id for outcome in stored.outcomes] == ["1", "2"]
    assert erased.memories_erased == 1


def test_version_that_moved_on_is_a_mismatch() -> None:
    def moved(request: pb.UpdateMemoryRequest, context: grpc.ServicerContext) -> pb.UpdateMemoryResponse:
        context.abort_with_status(
            rpc_status.to_status(status(grpc.StatusCode.ABORTED, "is at 3", info("VERSION_MISMATCH")))
        )
        raise AssertionError("abort raises")

    with (
        serving(UpdateMemory=moved) as address,
        MemoryClient(address) as client,
        pytest.raises(VersionMismatch, match="is at 3"),
    ):
        client.update("alice", "some-id", content="x", expected_version=2)


async def test_a_get_tells_who_served_it_and_at_which_level() -> None:
    def found(request: pb.GetMemoryRequest, context: grpc.ServicerContext) -> pb.GetMemoryResponse:
        report = pb.ReadReport(served_by=["cache"], degradation_level=pb.DEGRADATION_LEVEL_REDUCED)
        return pb.GetMemoryResponse(memory=pb.Memory(id=request.id, user_id=request.user_id), report=report)

    with serving(GetMemory=found) as address, MemoryClient(address) as client:
        result = client.get_with_report("some-id", user_id="alice")
        assert isinstance(result, GetResult)
        assert result.memory == client.get("some-id", user_id="alice")
        assert result.report.served_by == ("cache",)
        assert result.report.degradation_level is DegradationLevel.REDUCED
        async with AsyncMemoryClient(address) as other:
            assert await other.get_with_report("some-id", user_id="alice") == result


def test_unreachable_address_is_unavailable_within_the_deadline(silent_address: str) -> None:
    began = time.monotonic()
    with MemoryClient(silent_address, timeout_s=5) as client, pytest.raises(Unavailable) as caught:
        client.get("some-id")
    assert time.monotonic() - began < 5
    assert caught.value.reason == ""


async def test_async_unreachable_address_is_unavailable(silent_address: str) -> None:
    async with AsyncMemoryClient(silent_address, timeout_s=5) as client:
        with pytest.raises(Unavailable):
            await client.get("some-id")


def test_deadline_of_a_call_goes_before_the_clients() -> None:
    release = threading.Event()

    def hangs(request: pb.GetMemoryRequest, context: grpc.ServicerContext) -> pb.GetMemoryResponse:
        release.wait(10)
        return pb.GetMemoryResponse()

    with serving(GetMemory=hangs) as address, MemoryClient(address, timeout_s=60) as client:
        with pytest.raises(DeadlineExceeded):
            client.get("some-id", timeout_s=0.05)
        release.set()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "1", True])
def test_bad_timeout_is_refused_by_name(timeout_s: Any) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        MemoryClient(timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        AsyncMemoryClient(timeout_s=timeout_s)
    with MemoryClient("localhost:1") as client, pytest.raises(ValueError, match="timeout_s"):
        client.get("some-id", timeout_s=timeout_s)


@pytest.mark.parametrize("address", ["", "http://localhost:50051"])
def test_bad_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        MemoryClient(address)


def _pages(request: pb.ListMemoriesRequest, context: grpc.ServicerContext) -> pb.ListMemoriesResponse:
    start = int(request.page_token or 0)
    end = min(start + request.page_size, 5)
    return pb.ListMemoriesResponse(
        memories=[pb.Memory(id=str(n), user_id=request.user_id) for n in range(start, end)],
        next_page_token=str(end) if end < 5 else "",
    )


def test_iteration_goes_through_all_pages() -> None:
    with serving(ListMemories=_pages) as address, MemoryClient(address) as client:
        assert [memory.id for memory in client.iter_memories("alice", page_size=2)] == ["0", "1", "2", "3", "4"]


async def test_async_iteration_goes_through_all_pages() -> None:
    with serving(ListMemories=_pages) as address:
        async with AsyncMemoryClient(address) as client:
            ids = [memory.id async for memory in client.iter_memories("alice", page_size=2)]
    assert ids == ["0", "1", "2", "3", "4"]


def _versions(request: pb.ListMemoryVersionsRequest, context: grpc.ServicerContext) -> pb.ListMemoryVersionsResponse:
    first = int(request.page_token or 5)
    last = max(first - request.page_size, 0)
    return pb.ListMemoryVersionsResponse(
        versions=[pb.Memory(id=request.id, user_id=request.user_id, version=n) for n in range(first, last, -1)],
        next_page_token=str(last) if last else "",
    )


@pytest.mark.parametrize(
    ("said", "level"),
    [
        ("essential", DegradationLevel.ESSENTIAL),
        ("of a later service", DegradationLevel.UNSPECIFIED),
        ("", DegradationLevel.UNSPECIFIED),
    ],
)
async def test_versions_say_at_which_level_they_were_listed(said: str, level: DegradationLevel) -> None:
    def answer(request: pb.ListMemoryVersionsRequest, context: grpc.ServicerContext) -> pb.ListMemoryVersionsResponse:
        if said:
            context.set_trailing_metadata((("memshard-degradation-level", said),))
        return _versions(request, context)

    with serving(ListMemoryVersions=answer) as address:
        with MemoryClient(address) as client:
            assert client.list_versions("alice", "i").degradation_level is level
        async with AsyncMemoryClient(address) as aclient:
            assert (await aclient.list_versions("alice", "i")).degradation_level is level


async def test_iteration_goes_through_all_versions() -> None:
    with serving(ListMemoryVersions=_versions) as address:
        with MemoryClient(address) as client:
            assert [memory.version for memory in client.iter_versions("alice", "i", page_size=2)] == [5, 4, 3, 2, 1]
        async with AsyncMemoryClient(address) as aclient:
            versions = [memory.version async for memory in aclient.iter_versions("alice", "i", page_size=2)]
    assert versions == [5, 4, 3, 2, 1]


async def test_filter_and_mode_reach_every_read_that_takes_them() -> None:
    tea = field("metadata.topic") == "tea"
    seen: list[Any] = []

    def listing(request: pb.ListMemoriesRequest, context: grpc.ServicerContext) -> pb.ListMemoriesResponse:
        seen.append(request.filter)
        return pb.ListMemoriesResponse()

    def search(request: pb.SearchMemoriesRequest, context: grpc.ServicerContext) -> pb.SearchMemoriesResponse:
        seen.append(request.filter)
        assert request.mode == pb.SEARCH_MODE_KEYWORD
        return pb.SearchMemoriesResponse()

    with serving(ListMemories=listing, SearchMemories=search) as address:
        with MemoryClient(address) as client:
            client.list_memories("alice", filter=tea)
            list(client.iter_memories("alice", filter=tea))
            client.search("tea", filter=tea, mode=SearchMode.KEYWORD)
        async with AsyncMemoryClient(address) as aclient:
            await aclient.list_memories("alice", filter=tea)
            assert [memory async for memory in aclient.iter_memories("alice", filter=tea)] == []
            await aclient.search("tea", filter=tea, mode=SearchMode.KEYWORD)
    assert seen == [tea.message()] * 6


def test_what_the_server_lacks_is_unimplemented() -> None:
    with serving() as address, MemoryClient(address) as client, pytest.raises(Unimplemented):
        client.search("tea")


def test_answer_as_large_as_a_full_search_is_received() -> None:
    text = "x" * 65_536

    def search(request: pb.SearchMemoriesRequest, context: grpc.ServicerContext) -> pb.SearchMemoriesResponse:
        return pb.SearchMemoriesResponse(results=[pb.ScoredMemory(memory=pb.Memory(content=text))] * request.limit)

    with serving(SearchMemories=search) as address, MemoryClient(address) as client:
        assert len(client.search("tea", limit=1_000).results) == 1_000


def test_closed_client_says_so() -> None:
    client = MemoryClient("localhost:1")
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.get("some-id")


async def test_closed_async_client_says_so() -> None:
    client = AsyncMemoryClient("localhost:1")
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.get("some-id")


async def test_closing_ends_calls_under_way_and_cancelling_passes_through() -> None:
    arrived, release = threading.Semaphore(0), threading.Event()

    def hangs(request: pb.GetMemoryRequest, context: grpc.ServicerContext) -> pb.GetMemoryResponse:
        arrived.release()
        release.wait(10)
        return pb.GetMemoryResponse()

    with serving(GetMemory=hangs) as address:
        client = AsyncMemoryClient(address)
        cancelled, closed = (asyncio.create_task(client.get("some-id")) for _ in range(2))
        for _ in range(2):
            await asyncio.to_thread(arrived.acquire)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await client.close()
        with pytest.raises(Cancelled):
            await closed
        release.set()


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    def public(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()]
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert public(MemoryClient) == public(AsyncMemoryClient)
    assert issubclass(Unavailable, MemshardError)


class _EndsAllTheSame:
    """A call that was cancelled, and has its answer or its error in the same moment."""

    def __init__(self, outcome: pb.StoreMemoryResponse | grpc.RpcError) -> None:
        self._outcome = outcome

    def __call__(
        self, request: pb.StoreMemoryRequest, *, timeout: float, metadata: Sequence[tuple[str, str]]
    ) -> "_EndsAllTheSame":
        return self

    def __await__(self) -> Generator[Any, None, pb.StoreMemoryResponse]:
        try:
            yield from asyncio.sleep(60).__await__()
        except asyncio.CancelledError:
            if isinstance(self._outcome, grpc.RpcError):
                raise self._outcome from None
        assert isinstance(self._outcome, pb.StoreMemoryResponse)
        return self._outcome

    async def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    "outcome",
    [
        pb.StoreMemoryResponse(),
        grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), grpc.aio.Metadata()),
    ],
)
async def test_a_cancelled_task_ends_though_its_call_ends_in_another_way(outcome: Any) -> None:
    client = AsyncMemoryClient("127.0.0.1:1")
    answering: Any = client._answer
    task = asyncio.create_task(answering(_EndsAllTheSame(outcome), pb.StoreMemoryRequest(), None))
    await asyncio.sleep(0)
    assert task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_task_that_is_cancelled_at_any_moment_of_its_calls_ends_cancelled() -> None:
    def store(request: pb.StoreMemoryRequest, context: grpc.ServicerContext) -> pb.StoreMemoryResponse:
        if request.memory.content == "refused":
            context.abort(grpc.StatusCode.NOT_FOUND, "no")
        return pb.StoreMemoryResponse(memory=request.memory)

    chance = random.Random(7)
    with serving(StoreMemory=store) as address:
        async with AsyncMemoryClient(address) as client:
            await client.store("alice", "likes tea")
            for _ in range(150):
                contents = ["likes tea", "refused"] * 4
                tasks = [asyncio.create_task(client.store("alice", content)) for content in contents]
                for _ in range(chance.randrange(80)):
                    await asyncio.sleep(0)
                asked = [task for task in tasks if task.cancel()]
                await asyncio.wait(tasks)
                assert all(task.cancelled() for task in asked)
                assert all(task.cancelled() or task.exception() or task.result() for task in tasks)
