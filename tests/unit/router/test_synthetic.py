"""The monitor's own memory in a shard: it passes the breakers, closes them again, and no level keeps it out."""

import asyncio
import time

import pytest

from common.breaker import State
from common.deadline import Deadline
from common.errors import ReadOnly, Unavailable
from common.level import Level
from common.topology import ShardStatus
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.guard import Kind
from router.synthetic import Synthetic
from tests.support.eventually import eventually
from tests.unit.router.memories import cluster
from tests.unit.router.scripted import Router, Server, router


class Keeping(Server):
    """A shard that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("primary", writable=True)
        self.kept: dict[str, pb.Memory] = {}
        self.forgetful = False

    async def Store(self, request: shard_pb2.StoreRequest, deadline: Deadline) -> shard_pb2.StoreResponse:  # noqa: N802
        answer = await super().Store(request, deadline)
        if not self.forgetful:
            self.kept[request.memory.id] = request.memory
        return answer

    async def Get(self, request: shard_pb2.GetRequest, deadline: Deadline) -> shard_pb2.GetResponse:  # noqa: N802
        found = self.kept.get(request.id)
        return shard_pb2.GetResponse(found=[shard_pb2.FoundMemory(memory=found)] if found else [])

    async def Search(  # noqa: N802
        self, request: shard_pb2.SearchRequest, deadline: Deadline
    ) -> shard_pb2.SearchResponse:
        found = [memory for memory in self.kept.values() if memory.user_id == request.user_id]
        return shard_pb2.SearchResponse(results=[pb.ScoredMemory(memory=memory) for memory in found])

    async def Delete(  # noqa: N802
        self, request: shard_pb2.DeleteRequest, deadline: Deadline
    ) -> shard_pb2.DeleteResponse:
        return shard_pb2.DeleteResponse(deleted=self.kept.pop(request.id, None) is not None)


async def make_a_round(reader: Router) -> None:
    (shard,) = reader.topology.shards
    await Synthetic(cluster(), reader.shards).round(reader.topology, shard, time.time(), Deadline.after(5))


def store_breaker(reader: Router) -> State:
    return reader.shards.guards.of("shard-0").breakers[Kind.STORE].state


async def test_a_round_leaves_nothing_behind() -> None:
    async with Keeping() as shard, router(shard) as reader:
        await make_a_round(reader)
        assert len(shard.stored) == 1
        assert not shard.kept


async def test_an_answer_that_is_wrong_is_found() -> None:
    async with Keeping() as shard, router(shard) as reader:
        shard.forgetful = True
        with pytest.raises(Unavailable, match="was not found"):
            await make_a_round(reader)


async def test_it_closes_the_breaker_of_a_shard_that_nobody_else_may_write_to() -> None:
    async with Keeping() as shard, router(shard) as reader:
        shard.fails_next = 1000
        for _ in range(5):
            with pytest.raises(Unavailable):
                await make_a_round(reader)
        assert store_breaker(reader) is State.OPEN
        # What the level does on its own when writes have failed for a while.
        reader.shards.levels.override({"shard-0": Level.READONLY})
        with pytest.raises(ReadOnly):
            await reader.store(b"refused")
        shard.fails_next = 0

        async def closed() -> bool:
            await make_a_round(reader)
            return store_breaker(reader) is State.CLOSED

        await eventually(closed)
        with pytest.raises(ReadOnly):
            await reader.store(b"refused")


async def test_it_keeps_out_where_somebody_wants_nothing_written() -> None:
    async with Keeping() as shard, router(shard) as reader:
        (known,) = reader.topology.shards
        object.__setattr__(known, "status", ShardStatus.READONLY)
        with pytest.raises(ReadOnly):
            await make_a_round(reader)
        assert not shard.stored


async def test_with_a_breaker_open_it_asks_nobody() -> None:
    async with Keeping() as shard, router(shard) as reader:
        shard.fails_next = 1000
        shard.serving = False
        for _ in range(5):
            with pytest.raises(Unavailable):
                await make_a_round(reader)
        asked = len(shard.asked)
        with pytest.raises(Unavailable) as refused:
            await make_a_round(reader)
        assert refused.value.reason == "BREAKER_OPEN"
        assert len(shard.asked) == asked
        await asyncio.sleep(0)
