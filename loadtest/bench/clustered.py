"""memshard: through router and shard, or through the shard's own service alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc

from common.slots import slot_of
from loadtest.bench.contender import Endpoint, Row, Watch
from loadtest.bench.workload import K, Vector
from memshard import AsyncMemoryClient, Memory, ReadLevel
from memshard.internal.v1 import shard_pb2, shard_pb2_grpc
from memshard.v1 import memory_pb2 as pb
from memshard.v1 import memory_pb2_grpc

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

BATCH = 500
_TIMEOUT_S = 30.0
_OPTIONS = [("grpc.max_receive_message_length", 64 * 1024 * 1024)]


class Routed:
    """The public API with its generated stubs, one channel for each worker."""

    def __init__(self) -> None:
        self.watch = Watch()

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint["address"], options=_OPTIONS)
        self._stub: MemoryServiceAsyncStub = memory_pb2_grpc.MemoryServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        request = pb.SearchMemoriesRequest(user_id=user, embedding=query.tolist(), limit=K)
        answer = await self._stub.SearchMemories(request, timeout=_TIMEOUT_S)
        _seen(self.watch, answer.report.degradation_level)
        return [result.memory.id for result in answer.results]

    async def search_all(self, query: Vector) -> list[str]:
        """The same over the memories of all users: every shard is asked, and answers."""
        request = pb.SearchMemoriesRequest(embedding=query.tolist(), limit=K, require_all_shards=True)
        answer = await self._stub.SearchMemories(request, timeout=_TIMEOUT_S)
        _seen(self.watch, answer.report.degradation_level)
        return [result.memory.id for result in answer.results]

    async def store(self, caller: int, row: Row) -> None:
        answer = await self._stub.StoreMemory(pb.StoreMemoryRequest(memory=_memory(row)), timeout=_TIMEOUT_S)
        _seen(self.watch, answer.receipt.degradation_level)

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        return await self._get(pb.GetMemoryRequest(id=memory_id, user_id=user))

    async def get_again(self, caller: int, user: str, memory_id: str) -> Any:
        # As the SDK's clients ask.
        session = pb.ReadOptions(level=pb.READ_LEVEL_SESSION)
        return await self._get(pb.GetMemoryRequest(id=memory_id, user_id=user, read=session))

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        for first in range(0, len(rows), BATCH):
            memories = [_memory(row) for row in rows[first : first + BATCH]]
            answer = await self._stub.BatchStoreMemories(
                pb.BatchStoreMemoriesRequest(memories=memories), timeout=_TIMEOUT_S
            )
            assert all(result.id for result in answer.results), "an item of a batch was not stored"
            _seen(self.watch, answer.receipt.degradation_level)

    async def _get(self, request: pb.GetMemoryRequest) -> pb.Memory:
        answer = await self._stub.GetMemory(request, timeout=_TIMEOUT_S)
        _seen(self.watch, answer.report.degradation_level)
        return answer.memory


class WithClient:
    """The same through the SDK's client for asyncio."""

    def __init__(self) -> None:
        self.watch = Watch()

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        self._client = AsyncMemoryClient(endpoint["address"], timeout_s=_TIMEOUT_S)

    async def close(self) -> None:
        await self._client.close()

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        found = await self._client.search(user_id=user, embedding=query, limit=K)
        _seen(self.watch, found.report.degradation_level)
        return [result.memory.id for result in found.results]

    async def store(self, caller: int, row: Row) -> None:
        stored = await self._client.store(row.user, row.content, id=row.id, embedding=row.embedding)
        _seen(self.watch, stored.receipt.degradation_level)

    async def get(self, caller: int, user: str, memory_id: str) -> Memory:
        # Past every cache, as the stubs' callers ask.
        return await self._get(user, memory_id, ReadLevel.STRONG)

    async def get_again(self, caller: int, user: str, memory_id: str) -> Memory:
        return await self._get(user, memory_id, ReadLevel.SESSION)

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    async def _get(self, user: str, memory_id: str, read: ReadLevel) -> Memory:
        found = await self._client.get_with_report(memory_id, user_id=user, read=read)
        _seen(self.watch, found.report.degradation_level)
        return found.memory


class ShardOnly:
    """The shard's service without a router before it: what the router costs is the difference."""

    def __init__(self) -> None:
        self.watch = Watch()

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint["address"], options=_OPTIONS)
        self._stub: ShardServiceAsyncStub = shard_pb2_grpc.ShardServiceStub(self._channel)
        self._endpoint = endpoint

    async def close(self) -> None:
        await self._channel.close()

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        request = shard_pb2.SearchRequest(route=self._route(user), user_id=user, embedding=query.tolist(), k=K)
        answer = await self._stub.Search(request, timeout=_TIMEOUT_S)
        return [result.memory.id for result in answer.results]

    async def store(self, caller: int, row: Row) -> None:
        memory = _memory(row)
        memory.type, memory.importance = pb.MEMORY_TYPE_EPISODIC, 0.5
        await self._stub.Store(
            shard_pb2.StoreRequest(route=self._route(row.user), memory=memory, digest=b"\0" * 32), timeout=_TIMEOUT_S
        )

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        request = shard_pb2.GetRequest(route=self._route(user), id=memory_id, user_id=user)
        answer = await self._stub.Get(request, timeout=_TIMEOUT_S)
        return answer.found[0]

    get_again = get

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def _route(self, user: str) -> shard_pb2.Route:
        slot = slot_of(user.encode())
        return shard_pb2.Route(
            cluster_id=self._endpoint["cluster_id"],
            shard_id=self._endpoint["shard_id"],
            epoch=self._endpoint["epoch"],
            ranges=[shard_pb2.SlotRange(first=slot, last=slot)],
        )


def _seen(watch: Watch, level: int) -> None:
    if level != pb.DEGRADATION_LEVEL_NORMAL:
        watch.levels[pb.DegradationLevel.Name(pb.DegradationLevel.ValueType(level))] += 1


def _memory(row: Row) -> pb.Memory:
    # `.tolist()`, because protobuf fills a repeated field from an array ten times more slowly.
    return pb.Memory(id=row.id, user_id=row.user, content=row.content, embedding=row.embedding.tolist())
