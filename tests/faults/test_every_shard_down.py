"""Every shard is away: what still reaches them is the load and little more, and they come back by themselves.

Attempts are counted twice: as requests that pass the proxies, which nothing does that meets a reset, and as calls that
the router made, among them its monitor's own. The larger number counts.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import Record
from tests.support.cluster import free_port
from tests.support.faulty import FaultyCluster, faulty_cluster
from tests.support.generator import Plan, generating, result_file
from tests.support.metrics import sum_of
from tests.support.proxy import Fault

RETRIES_SHARE, RETRIES_PER_S = 0.2, 10


@asynccontextmanager
async def links_down(faulty: FaultyCluster, fault: Fault) -> AsyncIterator[None]:
    """While it lasts, no server of any shard can be spoken with."""
    shards = [shard.shard_id for shard in faulty.topology.shards]
    servers = [name for shard_id in shards for name in (shard_id, *faulty.replicas(shard_id))]
    await faulty.proxies.inflict(fault, *servers)
    try:
        yield
    finally:
        await faulty.proxies.heal(*servers)


@asynccontextmanager
async def databases_down(faulty: FaultyCluster) -> AsyncIterator[None]:
    """While it lasts, shards answer that they have no database: at once, which is when most is tried again."""
    # As long as it lies still, nobody starts them again.
    supervisor = faulty.cluster.kill("supervisor", signal.SIGSTOP)
    try:
        for shard in faulty.topology.shards:
            for server in (faulty.cluster.primary(shard.shard_id), *faulty.cluster.standbys(shard.shard_id)):
                faulty.cluster.kill(server)
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)


Outage = Callable[[FaultyCluster], AbstractAsyncContextManager[None]]


async def scenario(
    record: Record,
    tmp_path: Path,
    *,
    away_s: float,
    outage: Outage,
    name: str,
    back_within_s: float,
    replicas: int = 0,
) -> None:
    """With replicas, reads are EVENTUAL, so that there is another server to go on to from each."""
    port = free_port()
    # What is remembered would be answered without an attempt.
    settings = {"metrics_port": port, "memory_cache_bytes": 0, "search_cache_bytes": 0}
    async with faulty_cluster(shards=2, replicas=replicas, settings=settings) as faulty:

        async def attempts_so_far() -> tuple[int, int]:
            return await faulty.shard_requests(), int(await sum_of(port, "memory_server_calls"))

        shards = [shard.shard_id for shard in faulty.topology.shards]
        users = {shard_id: faulty.users(shard_id, 20) for shard_id in shards}
        file = result_file(tmp_path, "calls")
        plan = Plan(faulty.address, users, rate=100, timeout_s=2, eventual=replicas > 0, file=file)
        async with generating(plan) as generator:
            await generator.go()
            await asyncio.sleep(3)
            gone, before = time.monotonic(), await attempts_so_far()
            async with outage(faulty):
                await asyncio.sleep(away_s)
                passed, made = (after - b for after, b in zip(await attempts_so_far(), before, strict=True))
                attempts, healed = max(passed, made), time.monotonic()
            await asyncio.sleep(back_within_s + 4)
            calls = await generator.stop()
    offered = len(calls.where(since=gone, until=healed))
    bound = (1 + RETRIES_SHARE) * offered + RETRIES_PER_S * (healed - gone)
    failed_after = calls.where(since=healed, outcome="failed").rows["at"]
    back_s = float(failed_after.max() - healed) if len(failed_after) else 0.0
    answered = calls.where(since=gone, until=healed)
    record(
        f"every shard down: {name}",
        "attempts reaching the shards ≤ 1.2 times the offered load + 10/s per router; recovery without an operator",
        f"{attempts} attempts, {passed} of them past the proxies, for {offered} calls in {healed - gone:.0f} s "
        f"(bound {bound:.0f}); "
        f"p99 of the errors {answered.percentile_ms(99):.0f} ms; all well {back_s:.1f} s after healing",
    )
    after = calls.where(since=healed, outcome="failed")
    print(f"{dict(answered.counts())}; after healing {dict(after.counts())}")
    print([(round(float(row["at"] - healed), 2), round(float(row["took_s"]), 2)) for row in after.rows][-20:])
    assert 0 < attempts <= bound
    assert back_s < back_within_s
    assert len(calls.where(since=healed + back_within_s)) > 0


ANSWERS_LOST = partial(links_down, fault=Fault.HALF_OPEN)
RESET = partial(links_down, fault=Fault.RESET)
# PostgreSQL is started again, and recovers, before anything can be answered.
_START_S = 10


async def test_shards_that_answer_nothing_are_not_asked_more_than_the_load(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, away_s=5, outage=ANSWERS_LOST, name="answers lost", back_within_s=3)


async def test_shards_with_replicas_that_answer_nothing_are_not_asked_more_than_the_load(
    record: Record, tmp_path: Path
) -> None:
    name = "answers lost, with replicas"
    await scenario(record, tmp_path, away_s=5, outage=ANSWERS_LOST, name=name, back_within_s=3, replicas=1)


async def test_shards_without_databases_are_not_asked_more_than_the_load(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, away_s=5, outage=databases_down, name="databases dead", back_within_s=3 + _START_S)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("outage", "name", "back_within_s"),
    [
        (ANSWERS_LOST, "answers lost for 30 s", 2),
        (RESET, "connections reset for 30 s", 2),
        (databases_down, "databases dead for 30 s", 2 + _START_S),
    ],
)
@pytest.mark.parametrize("replicas", [0, 1])
async def test_shards_that_are_down_for_30_s(
    record: Record, tmp_path: Path, outage: Outage, name: str, back_within_s: float, replicas: int
) -> None:
    name += ", with replicas" if replicas else ""
    await scenario(
        record, tmp_path, away_s=30, outage=outage, name=name, back_within_s=back_within_s, replicas=replicas
    )
