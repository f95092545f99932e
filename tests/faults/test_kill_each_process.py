"""kill -9 of every process, one after the other, under a writer: all comes back, every acknowledged write once."""

import asyncio
import time
from dataclasses import dataclass, field

import pytest

from memshard import AsyncMemoryClient, DeadlineExceeded, Unavailable
from memshard.ids import new_id
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually

VICTIMS = ("shard-0", "postgres-shard-0", "redis", "router-0", "postgres-catalog", "shard-1", "postgres-shard-1")


@dataclass
class Writer:
    """Stores numbered memories for one user, each until it is acknowledged, always with the same id."""

    client: AsyncMemoryClient
    user_id: str
    acknowledged: dict[str, str] = field(default_factory=dict)
    retries: int = 0
    longest_wait_s: float = 0.0
    stop: bool = False

    async def run(self) -> None:
        while not self.stop:
            memory_id, content = new_id(), f"{self.user_id} remembers number {len(self.acknowledged)}"
            began = time.monotonic()
            while True:
                try:
                    await self.client.store(self.user_id, content, id=memory_id, timeout_s=2)
                    break
                except (Unavailable, DeadlineExceeded):
                    self.retries += 1
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - began)
            self.acknowledged[memory_id] = content


async def killed_and_back(cluster: LocalCluster, victim: str, writers: list[Writer]) -> None:
    """Kills one process, and waits until it is another, all are healthy, and every writer has got on."""
    written = sum(len(writer.acknowledged) for writer in writers)
    before = cluster.kill(victim)
    began = time.monotonic()
    await eventually(lambda: cluster.pid(victim) != before, within_s=20)
    await eventually(cluster.healthy, within_s=20)
    back_s = time.monotonic() - began
    marks = [len(writer.acknowledged) + 2 for writer in writers]
    await eventually(
        lambda: all(len(writer.acknowledged) > mark for writer, mark in zip(writers, marks, strict=True)), within_s=20
    )
    print(f"kill -9 {victim:18} healthy again after {back_s:4.1f} s; {written} writes before")


async def test_every_acknowledged_write_survives_kill_9_of_every_process_once() -> None:
    async with LocalCluster(shards=2) as cluster, AsyncMemoryClient(cluster.address) as client:
        writers = [Writer(client, f"writer-{n}") for n in range(8)]
        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.run())
            for victim in VICTIMS:
                await killed_and_back(cluster, victim, writers)
            for writer in writers:
                writer.stop = True
        for writer in writers:
            found = [memory async for memory in client.iter_memories(writer.user_id)]
            assert sorted(memory.id for memory in found) == sorted(writer.acknowledged)
            assert {memory.id: memory.content for memory in found} == writer.acknowledged
        total = sum(len(writer.acknowledged) for writer in writers)
        retries = sum(writer.retries for writer in writers)
        longest_s = max(writer.longest_wait_s for writer in writers)
        print(f"{total} acknowledged, 0 lost, 0 doubled; {retries} retries, longest wait {longest_s:.1f} s")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("round_", range(5))
async def test_every_acknowledged_write_survives_round_after_round(round_: int) -> None:
    await test_every_acknowledged_write_survives_kill_9_of_every_process_once()
