"""The embedding server dead, and then silent: texts are kept, found by their words, and embedded later."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import pytest

from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb
from tests.faults.conftest import Record
from tests.support.embedding_server import DIMENSIONS, EmbeddingServer
from tests.support.eventually import eventually
from tests.support.faulty import faulty_cluster
from tests.support.wire import memory_service, reason_of, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

USERS = 4
_EACH_S = 0.05
PENDING, READY = pb.EMBEDDING_STATE_PENDING, pb.EMBEDDING_STATE_READY
WORDS = ("green tea", "black coffee", "hot chocolate", "cold water", "red wine")


@dataclass
class Agents:
    """Agents who store texts and search for them, and look at what the answers say of themselves."""

    api: "MemoryServiceAsyncStub"
    failed: Counter[str] = field(default_factory=Counter)
    stored: dict[str, int] = field(default_factory=dict)
    """How each was stored: with its embedding, or without."""
    wrong: list[str] = field(default_factory=list)
    fallbacks: int = 0
    searches: int = 0
    took_s: list[float] = field(default_factory=list)
    stop: bool = False

    async def run(self, user: str) -> None:
        number = 0
        while not self.stop:
            began = time.monotonic()
            try:
                await self._step(user, number)
            except grpc.aio.AioRpcError as error:
                self.failed[f"{error.code().name} {reason_of(error)}"] += 1
            self.took_s.append(time.monotonic() - began)
            number += 1
            await asyncio.sleep(_EACH_S)

    async def _step(self, user: str, number: int) -> None:
        words = WORDS[number // 2 % len(WORDS)]
        if number % 2 == 0:
            memory_id = new_id()
            request = store_request(user, f"{user} likes {words} on day {number}", memory_id)
            self.stored[memory_id] = (await self.api.StoreMemory(request, timeout=5)).memory.embedding_state
            return
        # Asked as nobody asked before: an embedding of words that the router still has would need no embedder.
        query = f"{words} on day {number - 1}"
        found = await self.api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query=query, limit=3), timeout=5)
        self.searches += 1
        if "fallback" in found.report.served_by:
            self.fallbacks += 1
            if found.score_kind != pb.SCORE_KIND_TEXT_RANK:
                self.wrong.append("a search by words said that it was one by meaning")
            if not found.results or query not in found.results[0].memory.content:
                self.wrong.append("a search by words did not find what was stored just before")
        elif found.score_kind != pb.SCORE_KIND_COSINE:
            self.wrong.append("a search by words did not say that it was one")

    def p99_ms(self) -> float:
        """Of the calls since this was last asked."""
        took, self.took_s = sorted(self.took_s), []
        return took[int(len(took) * 0.99)] * 1000


async def scenario(record: Record, phase_s: float) -> None:
    with EmbeddingServer() as server:
        options = ["--embedder-url", server.url, "--embedder-model", "words"]
        async with (
            faulty_cluster(shards=2, embedder="http", dimensions=DIMENSIONS, options=options) as faulty,
            memory_service(faulty.address) as api,
        ):
            agents = Agents(api)
            async with asyncio.TaskGroup() as group:
                for number in range(USERS):
                    group.create_task(agents.run(f"user-{number}"))
                await asyncio.sleep(phase_s / 2)
                figures = [f"p99 {agents.p99_ms():.0f} ms before"]
                assert agents.fallbacks == 0
                server.down = True
                await asyncio.sleep(phase_s)
                figures.append(f"{agents.p99_ms():.0f} while it refuses")
                server.at_work.clear()
                await asyncio.sleep(phase_s)
                figures.append(f"{agents.p99_ms():.0f} while it is silent")
                while_away = agents.fallbacks
                server.down = False
                server.at_work.set()
                back = time.monotonic()
                agents.stop = True
            waiting = [memory_id for memory_id, state in agents.stored.items() if state == PENDING]

            async def all_embedded() -> bool:
                ready = 0
                for number in range(USERS):
                    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=f"user-{number}", page_size=1000))
                    ready += sum(memory.embedding_state == READY for memory in page.memories)
                return ready == len(agents.stored)

            await eventually(all_embedded, within_s=90)
            embedded_s = time.monotonic() - back
            again = pb.SearchMemoriesRequest(user_id="user-0", query="green tea")

            async def by_meaning() -> bool:
                return "fallback" not in (await api.SearchMemories(again)).report.served_by

            await eventually(by_meaning, within_s=90)
    record(
        "embedder dead, then silent",
        "stores keep the text and embed it later by themselves; text searches fall back to keyword search and say so",
        f"{len(agents.stored)} stores and {agents.searches} searches, {agents.failed.total()} failed; "
        f"{len(waiting)} texts kept without an embedding, all embedded {embedded_s:.0f} s after it was back; "
        f"{while_away} searches by words, {len(agents.wrong)} of them wrong; {', '.join(figures)}",
    )
    assert agents.failed == {}
    assert agents.wrong == []
    assert waiting
    assert while_away


@pytest.mark.timeout(240)
async def test_texts_are_kept_and_found_while_the_embedder_is_away(record: Record) -> None:
    await scenario(record, 4)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_texts_are_kept_and_found_while_the_embedder_is_away_for_long(record: Record) -> None:
    await scenario(record, 30)
