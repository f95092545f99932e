"""How fresh reads are asked to be: what both clients send, against a real server in this process."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from memshard import AsyncMemoryClient, InvalidArgument, MemoryClient, NewMemory, ReadLevel
from memshard.v1 import memory_pb2 as pb
from tests.unit.sdk.server import serving


class _Cluster:
    """Gives each write the next token, says what tokens cover, and keeps what reads asked for."""

    def __init__(self, covers: str = "shard-0") -> None:
        self.covers = covers
        self.reads: list[pb.ReadOptions] = []
        self._count = 0
        self._lock = threading.Lock()

    def receipt(self, context: grpc.ServicerContext) -> pb.WriteReceipt:
        with self._lock:
            self._count += 1
            context.set_trailing_metadata((("memshard-covers", self.covers),))
            return pb.WriteReceipt(consistency_token=b"%d" % self._count)

    def read(self, options: pb.ReadOptions, context: grpc.ServicerContext) -> None:
        self.reads.append(options)
        if len(options.consistency_tokens) > 1:
            one = b"+".join(options.consistency_tokens)
            context.set_trailing_metadata((("memshard-session-bin", one), ("memshard-covers", self.covers)))

    def handlers(self) -> dict[str, Callable[[Any, grpc.ServicerContext], Any]]:
        def reads(answer: Callable[[], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
            def handle(request: Any, context: grpc.ServicerContext) -> Any:
                self.read(request.read, context)
                return answer()

            return handle

        def writes(answer: Callable[..., Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
            return lambda request, context: answer(receipt=self.receipt(context))

        def batch(request: pb.BatchStoreMemoriesRequest, context: grpc.ServicerContext) -> Any:
            results = [pb.BatchStoreResult(id=memory.id) for memory in request.memories]
            return pb.BatchStoreMemoriesResponse(results=results, receipt=self.receipt(context))

        return {
            "StoreMemory": writes(pb.StoreMemoryResponse),
            "UpdateMemory": writes(pb.UpdateMemoryResponse),
            "DeleteMemory": writes(pb.DeleteMemoryResponse),
            "EraseUser": writes(pb.EraseUserResponse),
            "BatchStoreMemories": batch,
            "GetMemory": reads(pb.GetMemoryResponse),
            "ListMemories": reads(pb.ListMemoriesResponse),
            "SearchMemories": reads(pb.SearchMemoriesResponse),
        }

    def last(self) -> tuple[int, list[bytes]]:
        """Level and tokens of the last read."""
        return self.reads[-1].level, list(self.reads[-1].consistency_tokens)


@pytest.fixture
def cluster() -> _Cluster:
    return _Cluster()


@pytest.fixture
def address(cluster: _Cluster) -> Iterator[str]:
    with serving(**cluster.handlers()) as listening:
        yield listening


def test_reads_carry_what_was_written_of_their_user(cluster: _Cluster, address: str) -> None:
    with MemoryClient(address) as client:
        client.get("i", user_id="alice")
        assert cluster.last() == (pb.READ_LEVEL_SESSION, [])
        client.store("alice", "likes tea")
        client.get("i", user_id="alice")
        assert cluster.last() == (pb.READ_LEVEL_SESSION, [b"1"])
        client.list_memories("bob")
        assert cluster.last() == (pb.READ_LEVEL_SESSION, [])
        client.search("tea")
        assert cluster.last() == (pb.READ_LEVEL_SESSION, [b"1"])
        # Each kind of write brings a later token, which stands for those before.
        client.update("alice", "i", content="likes coffee")
        client.delete("alice", "i")
        client.erase_user("alice")
        list(client.iter_memories("alice"))
        assert cluster.last() == (pb.READ_LEVEL_SESSION, [b"4"])
        client.store_many([NewMemory("bob", "b"), NewMemory("carol", "c")])
        for user, token in (("alice", b"4"), ("bob", b"5"), ("carol", b"5")):
            client.search("tea", user_id=user)
            assert cluster.last() == (pb.READ_LEVEL_SESSION, [token])


async def test_async_reads_carry_what_was_written_of_their_user(cluster: _Cluster, address: str) -> None:
    async with AsyncMemoryClient(address) as client:
        await client.store("alice", "likes tea")
        await client.update("alice", "i", content="likes coffee")
        await client.delete("alice", "i")
        await client.erase_user("alice")
        await client.store_many([NewMemory("bob", "b")])
        for read in (
            client.get("i", user_id="alice"),
            client.list_memories("alice"),
            client.search("tea", user_id="alice"),
        ):
            await read
            assert cluster.last() == (pb.READ_LEVEL_SESSION, [b"4"])
        await client.get("i")
        assert cluster.last() == (pb.READ_LEVEL_SESSION, [b"5"])


def test_tokens_that_are_told_to_be_one_become_one(cluster: _Cluster, address: str) -> None:
    with MemoryClient(address) as client:
        for covers in ("shard-0", "shard-1"):
            cluster.covers = covers
            client.store("alice", "likes tea")
        cluster.covers = "shard-0,shard-1"
        client.get("i", user_id="alice")
        assert cluster.last()[1] == [b"1", b"2"]
        client.get("i", user_id="alice")
        assert cluster.last()[1] == [b"1+2"]


def test_a_session_goes_on_in_another_client(cluster: _Cluster, address: str) -> None:
    with MemoryClient(address) as one, MemoryClient(address) as other:
        one.store("alice", "likes tea")
        other.join_session("alice", one.session_tokens("alice"))
        for read in (lambda: other.get("i", user_id="alice"), lambda: other.search("tea")):
            read()
            assert cluster.last() == (pb.READ_LEVEL_SESSION, [b"1"])
        other.get("i", user_id="bob")
        assert cluster.last()[1] == []
        receipt = one.store("bob", "likes coffee").receipt
        other.join_session("bob", [receipt.consistency_token])
        other.get("i", user_id="bob")
        assert cluster.last()[1] == [b"2"]


@pytest.mark.parametrize("level", list(ReadLevel)[1:])
async def test_every_level_can_be_asked_for_by_call_and_by_client(
    cluster: _Cluster, address: str, level: ReadLevel
) -> None:
    bound: dict[str, Any] = {"max_staleness_s": 1.5} if level is ReadLevel.BOUNDED_STALENESS else {}
    expected = pb.ReadOptions(level=pb.ReadLevel.ValueType(level))
    if bound:
        expected.max_staleness.CopyFrom(duration_pb2.Duration(seconds=1, nanos=500_000_000))
    with MemoryClient(address) as client:
        client.get("i", user_id="alice", read=level, **bound)
        client.list_memories("alice", read=level, **bound)
        list(client.iter_memories("alice", read=level, **bound))
        client.search("tea", read=level, **bound)
    async with AsyncMemoryClient(address, read=level, **bound) as other:
        await other.get("i", user_id="alice")
        await other.list_memories("alice")
        assert [memory async for memory in other.iter_memories("alice")] == []
        await other.search("tea")
    assert cluster.reads == [expected] * 8


def test_only_sessions_carry_tokens(cluster: _Cluster, address: str) -> None:
    with MemoryClient(address) as client:
        client.store("alice", "likes tea")
        for level in (ReadLevel.STRONG, ReadLevel.EVENTUAL):
            client.get("i", user_id="alice", read=level)
            assert cluster.last() == (level, [])


def test_a_session_may_have_a_bound_too(cluster: _Cluster, address: str) -> None:
    with MemoryClient(address, max_staleness_s=2) as client:
        client.store("alice", "likes tea")
        client.get("i", user_id="alice")
        assert (cluster.last(), cluster.reads[-1].max_staleness.seconds) == ((pb.READ_LEVEL_SESSION, [b"1"]), 2)
        client.get("i", user_id="alice", read=ReadLevel.STRONG)
        assert not cluster.reads[-1].HasField("max_staleness")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"read": ReadLevel.BOUNDED_STALENESS}, "max_staleness_s"),
        ({"read": ReadLevel.EVENTUAL, "max_staleness_s": 1}, "max_staleness_s"),
        ({"read": ReadLevel.STRONG, "max_staleness_s": 1}, "max_staleness_s"),
        ({"max_staleness_s": 0}, "max_staleness_s"),
        ({"max_staleness_s": float("nan")}, "max_staleness_s"),
        ({"max_staleness_s": float("inf")}, "max_staleness_s"),
        ({"max_staleness_s": "1"}, "max_staleness_s"),
        ({"read": ReadLevel.UNSPECIFIED}, "read"),
        ({"read": "session"}, "read"),
        ({"read": 99}, "read"),
    ],
)
def test_levels_and_bounds_that_cannot_be_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        MemoryClient(**options)
    with pytest.raises(InvalidArgument, match=name):
        AsyncMemoryClient(**options)
    with MemoryClient("localhost:1") as client, pytest.raises(InvalidArgument, match=name):
        client.search("tea", **options)


def test_tokens_that_are_no_bytes_are_refused() -> None:
    with MemoryClient("localhost:1") as client, pytest.raises(InvalidArgument, match="tokens"):
        client.join_session("alice", ["text"])  # type: ignore[list-item]
