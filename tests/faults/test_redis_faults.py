"""Redis dead, slow, frozen, full of garbage, and answering garbage: no call fails, and no answer is another."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import pytest
from redis.asyncio import Redis

from common.slots import SLOT_COUNT
from local.cluster import REDIS
from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from tests.faults.conftest import Record
from tests.support.faulty import faulty_cluster
from tests.support.proxy import Fault
from tests.support.wire import memory_service, reason_of, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

AGENTS = 4
_EMBEDDING = [1.0] + [0.0] * 15


@dataclass
class Agents:
    """Agents who store, find by id alone, and delete, one call after the other, and look at every answer."""

    api: "MemoryServiceAsyncStub"
    calls: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    stop: bool = False

    async def run(self, user: str) -> None:
        mine: dict[str, str] = {}
        deleted: list[str] = []
        chance = random.Random(user)
        while not self.stop:
            began = time.monotonic()
            try:
                await self._step(user, mine, deleted, chance)
            except grpc.aio.AioRpcError as error:
                self.failed[f"{error.code().name} {reason_of(error)}"] += 1
            self.took_s.append(time.monotonic() - began)
            self.calls += 1

    async def _step(self, user: str, mine: dict[str, str], deleted: list[str], chance: random.Random) -> None:
        action = chance.random()
        if action < 0.3 or not mine:
            memory_id, content = new_id(), f"{user} remembers {chance.random()}"
            await self.api.StoreMemory(store_request(user, content, memory_id, embedding=_EMBEDDING), timeout=5)
            mine[memory_id] = content
            self.ids.append(memory_id)
        elif action < 0.4:
            memory_id = chance.choice(list(mine))
            answer = await self.api.DeleteMemory(pb.DeleteMemoryRequest(id=memory_id, user_id=user), timeout=5)
            if not answer.deleted:
                self.wrong.append("a memory that was there was not deleted")
            del mine[memory_id]
            deleted.append(memory_id)
        elif action < 0.5 and deleted:
            try:
                await self.api.GetMemory(pb.GetMemoryRequest(id=chance.choice(deleted)), timeout=5)
                self.wrong.append("a deleted memory was found")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
        else:
            memory_id = chance.choice(list(mine))
            try:
                found = (await self.api.GetMemory(pb.GetMemoryRequest(id=memory_id), timeout=5)).memory
                if (found.user_id, found.content) != (user, mine[memory_id]):
                    self.wrong.append("another memory was found")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                self.wrong.append("a memory that is there was not found")

    def p99_ms(self) -> float:
        """Of the calls since this was last asked."""
        took, self.took_s = sorted(self.took_s), []
        return took[int(len(took) * 0.99)] * 1000


@asynccontextmanager
async def at_work(api: "MemoryServiceAsyncStub") -> AsyncIterator[Agents]:
    agents = Agents(api)
    async with asyncio.TaskGroup() as group:
        for number in range(AGENTS):
            group.create_task(agents.run(f"agent-{number}"))
        try:
            yield agents
        finally:
            agents.stop = True


async def fill_with_garbage(redis: Redis, agents: Agents, seconds: float) -> int:
    """Writes over what Redis knows of places, again and again; how often."""
    chance, written = random.Random(0), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for memory_id in agents.ids[-200:]:
            key = f"loc:{memory_id}"
            match chance.randrange(5):
                case 0:
                    await redis.set(key, str(chance.randrange(SLOT_COUNT)))
                case 1:
                    await redis.set(key, chance.randbytes(40))
                case 2:
                    await redis.delete(key)
                    await redis.lpush(key, "1")
                case 3:
                    await redis.set(key, ",".join(str(chance.randrange(SLOT_COUNT)) for _ in range(8)))
                case _:
                    await redis.set(key, str(SLOT_COUNT + chance.randrange(10**6)))
            written += 1
        await asyncio.sleep(0.05)
    return written


async def scenario(record: Record, phase_s: float) -> None:
    # The router's own memory would answer for a while, and is not what is tried here.
    async with (
        faulty_cluster(shards=3, settings={"location_cache_entries": 0}) as faulty,
        memory_service(faulty.address) as api,
        Redis.from_url(faulty.cluster.redis_url()) as redis,
        at_work(api) as agents,
    ):
        await asyncio.sleep(phase_s)
        figures = [f"p99 {agents.p99_ms():.0f} ms before"]
        for name, fault, amount in (
            ("dead", Fault.RESET, 0.0),
            ("slow", Fault.LATENCY, 0.2),
            ("rather slow", Fault.LATENCY, 0.03),
            ("silent", Fault.BLACK_HOLE, 0.0),
            ("trickling", Fault.DRIP, 200.0),
            ("talking garbage", Fault.GARBAGE, 0.0),
        ):
            await faulty.proxies.inflict(fault, REDIS, amount=amount)
            await asyncio.sleep(phase_s)
            await faulty.proxies.heal(REDIS)
            figures.append(f"{agents.p99_ms():.0f} {name}")
        # From here on its breaker has to let it be asked again for the garbage to be seen.
        await asyncio.sleep(3)
        agents.took_s.clear()
        entries = await fill_with_garbage(redis, agents, phase_s)
        figures.append(f"{agents.p99_ms():.0f} full of garbage ({entries} entries)")
    record(
        "Redis dead, slow, silent, full of garbage",
        "0 failed requests, 0 wrong answers",
        f"{agents.calls} calls, {agents.failed.total()} failed, {len(agents.wrong)} wrong; {', '.join(figures)}",
    )
    assert agents.failed == {}
    assert agents.wrong == []


@pytest.mark.timeout(180)
async def test_whatever_redis_does_no_call_fails_and_no_answer_is_wrong(record: Record) -> None:
    await scenario(record, 1.5)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_whatever_redis_does_for_long_no_call_fails_and_no_answer_is_wrong(record: Record) -> None:
    await scenario(record, 12)
