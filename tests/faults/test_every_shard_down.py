"""Every shard is away: what still reaches them is the load and little more, and they come back by themselves."""

import asyncio
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Record
from tests.support.faulty import faulty_cluster
from tests.support.generator import Plan, generating, result_file
from tests.support.proxy import Fault

RETRIES_SHARE, RETRIES_PER_S = 0.2, 10


async def scenario(record: Record, tmp_path: Path, *, away_s: float, fault: Fault, name: str) -> None:
    async with faulty_cluster(shards=2) as faulty:
        shards = [shard.shard_id for shard in faulty.topology.shards]
        users = {shard_id: faulty.users(shard_id, 20) for shard_id in shards}
        plan = Plan(faulty.address, users, rate=100, timeout_s=2, file=result_file(tmp_path, "calls"))
        async with generating(plan) as generator:
            await generator.go()
            await asyncio.sleep(3)
            gone, counted = time.monotonic(), await faulty.shard_requests()
            await faulty.proxies.inflict(fault, *shards)
            await asyncio.sleep(away_s)
            attempts, healed = await faulty.shard_requests() - counted, time.monotonic()
            await faulty.proxies.heal(*shards)
            await asyncio.sleep(6)
            calls = await generator.stop()
    offered = len(calls.where(since=gone, until=healed))
    bound = (1 + RETRIES_SHARE) * offered + RETRIES_PER_S * (healed - gone)
    failed_after = calls.where(since=healed, outcome="failed").rows["at"]
    back_s = float(failed_after.max() - healed) if len(failed_after) else 0.0
    answered = calls.where(since=gone, until=healed)
    record(
        f"every shard down: {name}",
        "attempts reaching the shards ≤ 1.2 × offered load + 10/s per router; recovery without an operator",
        f"{attempts} attempts for {offered} calls in {healed - gone:.0f} s (bound {bound:.0f}); "
        f"p99 of the errors {answered.percentile_ms(99):.0f} ms; all well {back_s:.1f} s after healing",
    )
    print(dict(answered.counts()))
    assert attempts <= bound
    assert back_s < 3
    assert len(calls.where(since=healed + 3)) > 0


async def test_shards_that_answer_nothing_are_not_asked_more_than_the_load(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, away_s=5, fault=Fault.HALF_OPEN, name="answers lost")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "name"), [(Fault.HALF_OPEN, "answers lost for 30 s"), (Fault.RESET, "connections reset for 30 s")]
)
async def test_shards_that_are_down_for_30_s(record: Record, tmp_path: Path, fault: Fault, name: str) -> None:
    await scenario(record, tmp_path, away_s=30, fault=fault, name=name)
