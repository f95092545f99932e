"""The catalog frozen, out of reach, and dead: nobody notices."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from local import leftovers
from local.cluster import CATALOG_SERVER
from tests.faults.conftest import Record
from tests.support.faulty import FaultyCluster, faulty_cluster
from tests.support.generator import Plan, generating, result_file
from tests.support.proxy import Fault


def signal_catalog(faulty: FaultyCluster, number: int) -> None:
    """To the catalog's server and all of its backends."""
    for process in leftovers.find_postgres(faulty.cluster.plan().catalog_server().pgdata):
        process.send_signal(number)


@asynccontextmanager
async def hanging(faulty: FaultyCluster, away_s: float) -> AsyncIterator[None]:
    """Half of the time it hangs, for routers and shards alike; the other half no router reaches it."""
    signal_catalog(faulty, signal.SIGSTOP)
    try:
        await asyncio.sleep(away_s / 2)
    finally:
        signal_catalog(faulty, signal.SIGCONT)
    await faulty.proxies.inflict(Fault.RESET, CATALOG_SERVER)
    await asyncio.sleep(away_s / 2)
    yield
    await faulty.proxies.heal()


@asynccontextmanager
async def dead(faulty: FaultyCluster, away_s: float) -> AsyncIterator[None]:
    """For the whole of the time there is none, for anybody."""
    # As long as it lies still, nobody starts it again.
    supervisor = faulty.cluster.kill("supervisor", signal.SIGSTOP)
    try:
        signal_catalog(faulty, signal.SIGKILL)
        await asyncio.sleep(away_s)
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)


Outage = Callable[[FaultyCluster, float], AbstractAsyncContextManager[None]]


async def scenario(record: Record, tmp_path: Path, name: str, outage: Outage, *, away_s: float) -> None:
    async with faulty_cluster(shards=2, replicas=1) as faulty:
        users = {shard.shard_id: faulty.users(shard.shard_id, 10) for shard in faulty.topology.shards}
        mix = {"store": 3.0, "get": 3.0, "locate": 1.0, "list": 1.0, "search": 2.0}
        plan = Plan(faulty.address, users, mix, rate=80, timeout_s=5, file=result_file(tmp_path, "calls"))
        async with generating(plan) as generator:
            await generator.go()
            began = time.monotonic() + 2
            await asyncio.sleep(2 + away_s / 4)
            gone = time.monotonic()
            async with outage(faulty, away_s):
                back = time.monotonic()
            await asyncio.sleep(3)
            calls = await generator.stop()
    before, during = calls.where(since=began, until=gone), calls.where(since=gone, until=back)
    failed = calls.where(since=began, outcome="failed").counts()
    record(
        name,
        "0 failed requests",
        f"{len(during)} calls, {failed.total()} failed; "
        f"p99 {before.percentile_ms(99):.0f} → {during.percentile_ms(99):.0f} ms",
    )
    print(f"failed: {dict(failed)}")
    assert failed == {}


async def test_a_catalog_that_is_away_fails_no_call(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, "catalog hanging, then out of reach", hanging, away_s=6)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_catalog_that_is_dead_for_a_minute_fails_no_call(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, "catalog dead for 60 s", dead, away_s=60)
