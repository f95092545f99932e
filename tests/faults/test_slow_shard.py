"""One shard is ten times slower than it was: its callers wait, nobody else does, and few reads are asked twice.

How many are asked twice is the router's own count. What reaches the servers says that it counts all of them.
"""

import asyncio
import math
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Record
from tests.support.cluster import free_port
from tests.support.faulty import faulty_cluster
from tests.support.generator import Plan, generating, result_file
from tests.support.metrics import total_of
from tests.support.proxy import Fault

SLOW = "shard-0"
HEDGES_SHARE = 0.02
# Ten times what a read takes: 5 ms to 10 ms on an idle machine, with what the generator adds.
_ADDED_S = 0.05
# What a router may have saved up (`common.hedge.HedgeBudget`).
_SAVED_UP = 10
# Every ten seconds four calls to each of two shards (router/synthetic.py), by this router and by the cluster's own.
_MONITOR_EVERY_S, _OF_THE_MONITOR = 10, 16


async def scenario(record: Record, tmp_path: Path, *, before_s: float, slow_s: float, whole: bool) -> None:
    metrics = free_port()
    # What is remembered asks no shard.
    forgetful = {"memory_cache_bytes": 0, "memory_redis_ttl_s": 0, "search_cache_bytes": 0}
    async with faulty_cluster(shards=2, replicas=1, settings={"metrics_port": metrics, **forgetful}) as faulty:
        users = {shard.shard_id: faulty.users(shard.shard_id, 20) for shard in faulty.topology.shards}
        mix = {"get": 5.0, "list": 2.0, "search": 3.0}
        plan = Plan(
            faulty.address, users, mix, rate=150, timeout_s=5, eventual=True, file=result_file(tmp_path, "calls")
        )
        async with generating(plan) as generator:
            # The generator has stored what it reads, which is no read; nothing has been asked twice yet.
            requests, started = await faulty.shard_requests(), time.monotonic()
            await generator.go()
            began = time.monotonic() + 3
            await asyncio.sleep(3 + before_s)
            at_first, slow_from = await total_of(metrics, "memory_hedges"), time.monotonic()
            await faulty.proxies.inflict(Fault.LATENCY, SLOW, *faulty.replicas(SLOW), amount=_ADDED_S)
            await asyncio.sleep(slow_s)
            in_the_end, slow_until = await total_of(metrics, "memory_hedges"), time.monotonic()
            await faulty.proxies.heal()
            await asyncio.sleep(2)
            calls = await generator.stop()
            requests, took_s = await faulty.shard_requests() - requests, time.monotonic() - started
            in_all = int(await total_of(metrics, "memory_hedges"))
            # Of reads whose server did not answer in time: no hedges.
            again = int(await total_of(metrics, "memory_retries"))
    reads = len(calls.where(since=slow_from, until=slow_until))
    hedges = int(in_the_end - at_first)
    others = [calls.where(but_group=SLOW, since=a, until=b) for a, b in ((began, slow_from), (slow_from, slow_until))]
    mine = [calls.where(group=SLOW, since=a, until=b) for a, b in ((began, slow_from), (slow_from, slow_until))]
    failed = calls.where(outcome="failed").counts()
    record(
        "a shard 10 times slower",
        "its callers only; hedges ≤ 2 %",
        f"its own: p50 {mine[0].percentile_ms(50):.1f} → {mine[1].percentile_ms(50):.1f} ms; "
        f"others: p50 {others[0].percentile_ms(50):.1f} → {others[1].percentile_ms(50):.1f} ms, "
        f"p99 {others[0].percentile_ms(99):.0f} → {others[1].percentile_ms(99):.0f} ms; "
        f"{hedges} reads of {reads} asked twice ({hedges / reads:.1%}), "
        f"{in_all} of all {len(calls)} ({in_all / len(calls):.1%}); {failed.total()} failed",
    )
    assert failed == {}
    # What was added is a floor, whatever else the machine does; a tenth are of the moment when it began.
    assert mine[1].percentile_ms(10) >= _ADDED_S * 1000
    # Whatever else the machine does, a tenth of the others' calls are quicker than what was added.
    assert others[1].percentile_ms(10) < _ADDED_S * 1000
    if whole:
        assert others[1].percentile_ms(50) < 1.5 * others[0].percentile_ms(50) + 10
        assert others[1].percentile_ms(99) < 2 * others[0].percentile_ms(99)
    assert in_all <= HEDGES_SHARE * len(calls) + _SAVED_UP
    assert hedges <= HEDGES_SHARE * reads + _SAVED_UP
    assert requests - len(calls) - in_all - again <= _of_the_monitor(took_s)


def _of_the_monitor(seconds: float) -> int:
    """How many of the calls of so many seconds may be the health monitors'."""
    return _OF_THE_MONITOR * math.ceil(seconds / _MONITOR_EVERY_S)


async def test_a_slow_shard_is_slow_for_its_own_callers(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, before_s=4, slow_s=5, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_slow_shard_is_slow_for_its_own_callers_for_30_s(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, before_s=20, slow_s=30, whole=True)
