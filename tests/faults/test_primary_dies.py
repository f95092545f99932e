"""Failovers under load: nothing acknowledged is lost or doubled, and the time without writes is short."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from local import leftovers
from memshard import Durability
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.load import Load
from tests.support.wire import memory_service, store_request

SHARD = "shard-0"
EVENTUAL = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)
MAX_RTO_S = 5.0
# Reads that need no primary never stop. A router waits a moment for one that is gone; the rest is the machine.
MAX_WITHOUT_READS_S = 2.0
# A standby that flushes nothing counts as lost after two seconds; then the catalog and the server are told.
MAX_DEGRADE_S = 5.0


@asynccontextmanager
async def under_load(cluster: LocalCluster) -> AsyncIterator[Load]:
    """Writers and readers on a cluster whose commits wait for its standby; stopped at the end, and checked."""
    await eventually(lambda: durability(cluster, "QUORUM"), within_s=30)
    load = Load(cluster.address)
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        try:
            await eventually(lambda: load.total() > 50)
            yield load
        finally:
            load.stop()
    lost, doubled = await load.lost_and_doubled()
    print(f"{load.total()} acknowledged, {lost} lost, {doubled} doubled; {len(load.failures)} calls failed")
    assert (lost, doubled) == (0, 0)


async def durability(cluster: LocalCluster, expected: str) -> bool:
    """Whether `memshard status` says that a write would be acknowledged so, and all is well."""
    status = await cluster.status()
    return all(p["healthy"] for p in status["processes"]) and status["shards"][0]["durability"] == expected


@dataclass(frozen=True)
class Outage:
    """Seconds without a write, and without a read."""

    writes_s: float
    reads_s: float


async def outage(cluster: LocalCluster, load: Load) -> Outage:
    """Kills the primary PostgreSQL, and waits until commits wait for a standby again."""
    old = cluster.primary(SHARD)
    began = time.monotonic()
    cluster.kill(old)
    await eventually(lambda: cluster.primary(SHARD) != old, within_s=20)
    mark = load.total()
    await eventually(lambda: load.total() > mark + 50, within_s=20)
    without_writes_s = load.writes.longest_gap_s(began, time.monotonic())
    await eventually(lambda: durability(cluster, "QUORUM"), within_s=30)
    # The old primary's coming back, and the replica's move to it, must not be noticed by readers either.
    without_reads_s = load.reads.longest_gap_s(began, time.monotonic())
    print(
        f"kill -9 {old}: {without_writes_s:.2f} s without writes, {without_reads_s:.2f} s without reads, "
        f"{len(load.read_failures)} reads failed, QUORUM again after {time.monotonic() - began:.1f} s"
    )
    return Outage(without_writes_s, without_reads_s)


async def killed_primaries(kills: int, interval_s: float, *, replicas: int = 1, of_machine_s: float = 0.0) -> None:
    """Kills the primary that many times, at least so many seconds apart. `of_machine_s`: what a machine that stands
    still for a moment may add, as one that other tests use too does.
    """
    async with LocalCluster(shards=1, replicas=replicas, embedder="none", dimensions=3) as cluster:
        async with under_load(cluster) as load:
            outages = []
            for _ in range(kills):
                next_kill = time.monotonic() + interval_s
                outages.append(await outage(cluster, load))
                await eventually(lambda at=next_kill: time.monotonic() >= at, within_s=interval_s + 1)  # type: ignore[misc]
        writes_s, reads_s = ([getattr(one, name) for one in outages] for name in ("writes_s", "reads_s"))
        print(
            f"time without writes: median {statistics.median(writes_s):.2f} s, longest {max(writes_s):.2f} s; "
            f"longest without reads {max(reads_s):.2f} s, {len(load.read_failures)} reads failed"
        )
        assert statistics.median(writes_s) < MAX_RTO_S + of_machine_s
        assert max(reads_s) < MAX_WITHOUT_READS_S + of_machine_s
        assert [f"{type(error).__name__}: {error}" for error in load.read_failures] == []
        assert load.durabilities[Durability.QUORUM] > 0


async def test_acked_writes_survive_primary_sigkill() -> None:
    await killed_primaries(kills=1, interval_s=1.0, of_machine_s=5.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_acked_writes_survive_primary_sigkill_three_times_in_30_s() -> None:
    await killed_primaries(kills=3, interval_s=10.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_acked_writes_survive_primary_sigkill_with_two_standbys() -> None:
    """Which of the two takes over depends on how far each of them is."""
    await killed_primaries(kills=3, interval_s=5.0, replicas=2)


async def test_a_planned_failover_is_seen_by_no_caller() -> None:
    async with (
        LocalCluster(shards=1, replicas=1, embedder="none", dimensions=3) as cluster,
        under_load(cluster) as load,
    ):
        for _ in range(2):
            await eventually(lambda: durability(cluster, "QUORUM"), within_s=30)
            old, began = cluster.primary(SHARD), time.monotonic()
            print(await cluster.run("failover", SHARD))
            assert cluster.primary(SHARD) != old
            mark = load.total()
            await eventually(lambda mark=mark: load.total() > mark + 50)  # type: ignore[misc]
            print(f"{load.writes.longest_gap_s(began, time.monotonic()):.2f} s without writes")
        assert [f"{type(error).__name__}: {error}" for error in load.failures] == []


async def test_nothing_of_before_a_failover_is_answered_from_memory_after_it() -> None:
    """Though nobody has read or written anything since that would tell the router."""
    async with (
        LocalCluster(shards=1, replicas=1, embedder="none", dimensions=3) as cluster,
        memory_service(cluster.address) as api,
    ):
        stored = await api.StoreMemory(store_request("alice", "green tea", embedding=[1, 0, 0]))

        async def got_from_memory() -> bool:
            get = pb.GetMemoryRequest(id=stored.memory.id, user_id="alice", read=EVENTUAL)
            return list((await api.GetMemory(get)).report.served_by) == ["cache"]

        async def found_in_memory() -> bool:
            search = pb.SearchMemoriesRequest(user_id="alice", embedding=[1, 0, 0], read=EVENTUAL)
            return list((await api.SearchMemories(search)).report.served_by) == ["cache"]

        async def asked_again() -> bool:
            return not await got_from_memory()

        await eventually(lambda: durability(cluster, "QUORUM"), within_s=30)
        await eventually(got_from_memory, within_s=30)
        await eventually(found_in_memory, within_s=30)
        await cluster.run("failover", SHARD)
        await eventually(asked_again, within_s=5)
        assert not await found_in_memory()


async def test_when_the_last_standby_is_gone_writes_go_on_as_local_and_quorum_comes_back() -> None:
    async with (
        LocalCluster(shards=1, replicas=1, embedder="none", dimensions=3) as cluster,
        under_load(cluster) as load,
    ):
        (standby,) = cluster.standbys(SHARD)
        # Frozen first: one that is dead would be back before anybody had to do without it.
        frozen = leftovers.find_postgres(cluster.plan().shard_servers(SHARD)[standby].pgdata)
        began = time.monotonic()
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        await eventually(lambda: load.last_durability is Durability.LOCAL, within_s=MAX_DEGRADE_S + 10)
        local_after_s = time.monotonic() - began
        assert (await cluster.status())["shards"][0]["durability"] == "LOCAL"
        mark = load.total()
        await eventually(lambda: load.total() > mark + 50)
        os.kill(cluster.pid(standby), signal.SIGKILL)
        await eventually(lambda: durability(cluster, "QUORUM"), within_s=30)
        await eventually(lambda: load.last_durability is Durability.QUORUM)
        print(f"LOCAL after {local_after_s:.1f} s; QUORUM again after {time.monotonic() - began:.1f} s")
        assert local_after_s < MAX_DEGRADE_S + 5
