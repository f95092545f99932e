"""One user of one shard, asked directly: what the tests of replication store and read."""

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from tests.support.replicated import DIMENSIONS, SHARD, Replicated
from tests.support.wire import route, user_slot

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub


@dataclass
class Place:
    """One user of a shard that has a primary and a standby."""

    servers: Replicated
    shard: "ShardServiceAsyncStub"
    user: str = "alice"
    _replica: "ShardServiceAsyncStub | None" = None

    @property
    def replica(self) -> "ShardServiceAsyncStub":
        assert self._replica is not None
        return self._replica

    @property
    def slot(self) -> int:
        return user_slot(self.user)

    def route(self, fresh: shard_pb2.Freshness | None = None) -> shard_pb2.Route:
        shard = self.servers.topology.shards[0]
        found = route(self.servers.topology, shard, self.slot)
        if fresh is not None:
            found.fresh.CopyFrom(fresh)
        return found

    def store_request(self, content: str = "tea", memory_id: str = "") -> shard_pb2.StoreRequest:
        """A request to store a memory; the same one again is the same request."""
        memory = pb.Memory(
            id=memory_id or str(uuid.uuid4()),
            user_id=self.user,
            content=content,
            type=pb.MEMORY_TYPE_EPISODIC,
            embedding=[0.1] * DIMENSIONS,
        )
        return shard_pb2.StoreRequest(route=self.route(), memory=memory, digest=b"\0" * 32)

    async def store(self, content: str = "tea", timeout_s: float = 20.0) -> shard_pb2.ShardPosition:
        """Stores a memory, and returns the position that its token would have."""
        answer = await self.shard.Store(self.store_request(content), timeout=timeout_s)
        return shard_pb2.ShardPosition(shard_id=SHARD, timeline=answer.commit.timeline, lsn=answer.commit.lsn)

    async def contents(
        self, fresh: shard_pb2.Freshness | None, stub: "ShardServiceAsyncStub | None" = None
    ) -> list[str]:
        """The user's memories by the replica, or by another."""
        request = shard_pb2.ListRequest(route=self.route(fresh), user_id=self.user, page_size=10)
        page = await (stub or self.replica).List(request, timeout=10)
        return [memory.content for memory in page.memories]

    async def health(self, name: str = "replica-b") -> int:
        async with grpc.aio.insecure_channel(self.servers.addresses[name]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)  # Its published stubs lack the methods.
            return int((await health.Check(health_pb2.HealthCheckRequest())).status)


def at(position: shard_pb2.ShardPosition, wait_ms: int = 0) -> shard_pb2.Freshness:
    """What a read asks for that has a token."""
    return shard_pb2.Freshness(position=position, wait_ms=wait_ms)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with, which it must."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
