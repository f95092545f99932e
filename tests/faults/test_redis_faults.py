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
from google.protobuf.field_mask_pb2 import FieldMask
from redis.asyncio import Redis

from common.slots import SLOT_COUNT
from local.cluster import REDIS
from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from tests.faults.conftest import Record
from tests.support.faulty import faulty_cluster
from tests.support.proxy import Fault
from tests.support.wire import memory_service, reason_of

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

AGENTS = 4
# As many as a search asks for.
_FOUND = 10
_TIMEOUT_S = 5
_EMBEDDING = [1.0] + [0.0] * 15


@dataclass
class Agent:
    """What one user of its own has stored, and so what may be answered."""

    user: str
    chance: random.Random
    mine: dict[str, str] = field(default_factory=dict)
    """What is there now."""
    said: dict[str, set[str]] = field(default_factory=dict)
    """All that ever was there, by id: EVENTUAL answers may be of before a change."""
    deleted: list[str] = field(default_factory=list)
    token: bytes = b""
    """Covers all of it."""

    def new(self) -> pb.Memory:
        """A memory to be stored."""
        content = f"{self.user} remembers {self.chance.random()}"
        return pb.Memory(id=new_id(), user_id=self.user, content=content, embedding=_EMBEDDING)

    def has(self, memory_id: str, content: str, receipt: pb.WriteReceipt) -> None:
        """It has been stored, or changed."""
        self.mine[memory_id] = content
        self.said.setdefault(memory_id, set()).add(content)
        self.token = receipt.consistency_token

    def any(self) -> str:
        """One of those that are there, most often one of the latest, which was read a short while ago."""
        ids = list(self.mine)
        return self.chance.choice(ids[-10:] if self.chance.random() < 0.7 else ids)

    def reading(self) -> pb.ReadOptions:
        """EVENTUAL, or SESSION with all that this agent has done."""
        if self.chance.random() < 0.7:
            return pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)
        return pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=[self.token] if self.token else [])


@dataclass
class Agents:
    """Agents who store, one or many, change, find by id alone, get, search and delete, one call after the other, and
    look at every answer."""

    api: "MemoryServiceAsyncStub"
    calls: int = 0
    from_cache: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    stop: bool = False

    async def run(self, user: str) -> None:
        agent = Agent(user, random.Random(user))
        steps = [
            self._store,
            self._batch,
            self._update,
            self._delete,
            self._miss,
            self._locate,
            self._get,
            self._search,
        ]
        while not self.stop:
            (step,) = agent.chance.choices(steps, [15, 4, 8, 6, 6, 20, 35, 8]) if agent.mine else [self._store]
            began = time.monotonic()
            try:
                await step(agent)
            except grpc.aio.AioRpcError as error:
                self.failed[f"{error.code().name} {reason_of(error)}"] += 1
            self.took_s.append(time.monotonic() - began)
            self.calls += 1

    async def _store(self, agent: Agent) -> None:
        memory = agent.new()
        answer = await self.api.StoreMemory(pb.StoreMemoryRequest(memory=memory), timeout=_TIMEOUT_S)
        agent.has(memory.id, memory.content, answer.receipt)
        self.ids.append(memory.id)

    async def _batch(self, agent: Agent) -> None:
        memories = [agent.new() for _ in range(3)]
        answer = await self.api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories), timeout=_TIMEOUT_S)
        for memory, result in zip(memories, answer.results, strict=True):
            if result.id != memory.id:
                self.failed["an item of a batch"] += 1
                continue
            agent.has(memory.id, memory.content, answer.receipt)
            self.ids.append(memory.id)

    async def _update(self, agent: Agent) -> None:
        memory = agent.new()
        memory.id = agent.any()
        request = pb.UpdateMemoryRequest(memory=memory, update_mask=FieldMask(paths=["content", "embedding"]))
        answer = await self.api.UpdateMemory(request, timeout=_TIMEOUT_S)
        agent.has(memory.id, memory.content, answer.receipt)

    async def _delete(self, agent: Agent) -> None:
        memory_id = agent.any()
        request = pb.DeleteMemoryRequest(id=memory_id, user_id=agent.user)
        answer = await self.api.DeleteMemory(request, timeout=_TIMEOUT_S)
        if not answer.deleted:
            self.wrong.append("a memory that was there was not deleted")
        del agent.mine[memory_id]
        agent.deleted.append(memory_id)
        agent.token = answer.receipt.consistency_token

    async def _miss(self, agent: Agent) -> None:
        """Looks for what is no more."""
        if not agent.deleted:
            return
        request = pb.GetMemoryRequest(id=agent.chance.choice(agent.deleted))
        if agent.chance.random() < 0.5:
            request.user_id = agent.user
            request.read.CopyFrom(pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=[agent.token]))
        if await self._found(request) is not None:
            self.wrong.append("a deleted memory was found")

    async def _locate(self, agent: Agent) -> None:
        """Finds by id alone, which is strong."""
        memory_id = agent.any()
        self._judge(agent, await self._found(pb.GetMemoryRequest(id=memory_id)), {agent.mine[memory_id]})

    async def _get(self, agent: Agent) -> None:
        memory_id = agent.any()
        read = agent.reading()
        found = await self._found(pb.GetMemoryRequest(id=memory_id, user_id=agent.user, read=read))
        self._judge(agent, found, _possible(agent, memory_id, read))

    async def _search(self, agent: Agent) -> None:
        """The same twice, of which the second is remembered. All are as near, so the order is that of their ids."""
        read = agent.reading()
        request = pb.SearchMemoriesRequest(user_id=agent.user, embedding=_EMBEDDING, limit=_FOUND, read=read)
        for _ in range(2):
            answer = await self.api.SearchMemories(request, timeout=_TIMEOUT_S)
            self._count(answer.report)
            found = [result.memory for result in answer.results]
            for memory in found:
                self._judge(agent, memory, _possible(agent, memory.id, read))
            expected = sorted(agent.mine)[:_FOUND]
            if read.level == pb.READ_LEVEL_SESSION and [memory.id for memory in found] != expected:
                self.wrong.append("a search has not found what is there")

    async def _found(self, request: pb.GetMemoryRequest) -> pb.Memory | None:
        try:
            answer = await self.api.GetMemory(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None
        self._count(answer.report)
        return answer.memory

    def _judge(self, agent: Agent, found: pb.Memory | None, possible: set[str]) -> None:
        if found is None:
            self.wrong.append("a memory that is there was not found")
        elif found.user_id != agent.user or found.content not in possible:
            self.wrong.append("another memory was found, or one of before a change")

    def _count(self, report: pb.ReadReport) -> None:
        self.from_cache += "cache" in report.served_by

    def p99_ms(self) -> float:
        """Of the calls since this was last asked."""
        took, self.took_s = sorted(self.took_s), []
        return took[int(len(took) * 0.99)] * 1000


def _possible(agent: Agent, memory_id: str, read: pb.ReadOptions) -> set[str]:
    """What a memory may be by an answer of this level."""
    if read.level == pb.READ_LEVEL_EVENTUAL:
        return agent.said.get(memory_id, set())
    return {agent.mine[memory_id]} if memory_id in agent.mine else set()


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
    """Writes over what Redis knows of places and of memories, again and again; how often."""
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
                    await _make_a_list(redis, key)
                case 3:
                    await redis.set(key, ",".join(str(chance.randrange(SLOT_COUNT)) for _ in range(8)))
                case _:
                    await redis.set(key, str(SLOT_COUNT + chance.randrange(10**6)))
            written += 1
        written += await _garble_memories(redis, chance)
        await asyncio.sleep(0.05)
    return written


async def _make_a_list(redis: Redis, key: str) -> None:
    """At once: routers write to it in between."""
    async with redis.pipeline(transaction=True) as both:
        both.delete(key)
        both.lpush(key, "1")
        await both.execute()


async def _garble_memories(redis: Redis, chance: random.Random) -> int:
    """Writes over some of the memories that Redis has; how many."""
    keys = [key async for key in redis.scan_iter("mem:*", count=1000)][:200]
    for key in keys:
        match chance.randrange(5):
            case 0:
                await redis.set(key, chance.randbytes(200), ex=60)
            case 1:
                # An entry of ours, of another memory.
                other = chance.choice(keys)
                entry = await redis.get(other) if await redis.type(other) == b"string" else b""
                await redis.set(key, entry or b"", ex=60)
            case 2:
                await _make_a_list(redis, key)
            case 3 if await redis.type(key) == b"string":
                await redis.setrange(key, chance.randrange(100), chance.randbytes(8))
            case _:
                await redis.persist(key)
    return len(keys)


async def scenario(record: Record, phase_s: float) -> None:
    # The router's own memory would answer for a while, and is not what is tried here. Without any it would not ask
    # Redis for memories either.
    settings = {"location_cache_entries": 0, "memory_cache_ttl_s": 0.2}
    async with (
        faulty_cluster(shards=3, settings=settings) as faulty,
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
        f"{agents.calls} calls, {agents.from_cache} of them answered from caches, {agents.failed.total()} failed, "
        f"{len(agents.wrong)} wrong; {', '.join(figures)}",
    )
    assert agents.failed == {}
    assert agents.wrong == []
    assert agents.from_cache > 0


@pytest.mark.timeout(180)
async def test_whatever_redis_does_no_call_fails_and_no_answer_is_wrong(record: Record) -> None:
    await scenario(record, 1.5)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_whatever_redis_does_for_long_no_call_fails_and_no_answer_is_wrong(record: Record) -> None:
    await scenario(record, 12)
