"""SIGSTOP of a replica: whoever reads hardly notices, and after SIGCONT it serves again."""

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import quantiles

import pytest

from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually

REPLICA = "shard-0-replica-1"
READERS = 4
# What a replica gets for a read.
PATIENCE_S = 0.25


@dataclass
class Reader:
    """Reads what it has written, again and again, with SESSION reads."""

    client: AsyncMemoryClient
    user: str
    latencies_s: list[float] = field(default_factory=list)
    served_by: Counter[str] = field(default_factory=Counter)
    stop: bool = False

    async def run(self) -> None:
        while not self.stop:
            began = time.monotonic()
            page = await self.client.list_memories(self.user, page_size=5, timeout_s=5)
            self.latencies_s.append(time.monotonic() - began)
            assert page.memories
            self.served_by["+".join(page.report.served_by)] += 1


@dataclass(frozen=True)
class Phase:
    """What reads were like for a while."""

    reads: int
    p50_ms: float
    p99_ms: float
    longest_ms: float
    served_by: Counter[str]

    def __str__(self) -> str:
        return (
            f"{self.reads} reads, p50 {self.p50_ms:.1f} ms, p99 {self.p99_ms:.1f} ms, "
            f"longest {self.longest_ms:.0f} ms, {dict(self.served_by)}"
        )


async def phase(readers: list[Reader], reads: int) -> Phase:
    """Waits for so many reads, and sums them up."""
    for reader in readers:
        reader.latencies_s.clear()
        reader.served_by.clear()
    await eventually(lambda: sum(len(reader.latencies_s) for reader in readers) >= reads, within_s=300)
    latencies = [seconds * 1000 for reader in readers for seconds in reader.latencies_s]
    cuts = quantiles(latencies, n=100)
    served_by = sum((reader.served_by for reader in readers), Counter[str]())
    return Phase(len(latencies), cuts[49], cuts[98], max(latencies), served_by)


async def scenario(reads: int, *, whole: bool) -> None:
    """`whole`: with figures to go by. Of a few reads, each moment in which the machine stands still is a large part."""
    of_machine_s = 0.75 if whole else 3
    async with (
        # Frozen for as long as the test likes.
        LocalCluster(shards=1, replicas=1, options=["--hung-after", "0"]) as cluster,
        AsyncMemoryClient(cluster.address) as client,
    ):
        await eventually(cluster.healthy, within_s=60)
        readers = [Reader(client, f"user-{number}") for number in range(READERS)]
        for reader in readers:
            for number in range(10):
                await client.store(reader.user, f"memory number {number}")
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.run())
            await eventually(lambda: all(reader.served_by["replica"] for reader in readers))
            before = await phase(readers, reads)
            cluster.kill(REPLICA, signal.SIGSTOP)
            try:
                frozen = await phase(readers, reads)
            finally:
                cluster.kill(REPLICA, signal.SIGCONT)
            thawed_at = time.monotonic()
            for reader in readers:
                reader.served_by.clear()
            await eventually(lambda: all(reader.served_by["replica"] for reader in readers))
            back_s = time.monotonic() - thawed_at
            for reader in readers:
                reader.stop = True
        print(f"before: {before}\nfrozen: {frozen}\nserving again {back_s:.2f} s after SIGCONT")
        assert frozen.p99_ms < (3 * before.p99_ms if whole else PATIENCE_S * 1000)
        assert frozen.longest_ms < (PATIENCE_S + of_machine_s) * 1000
        assert before.served_by["replica"] > frozen.served_by["replica"]


@pytest.mark.timeout(240)
async def test_a_frozen_replica_is_hardly_noticed_and_serves_again() -> None:
    await scenario(2_000, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_frozen_replica_is_hardly_noticed_for_long() -> None:
    await scenario(30_000, whole=True)
