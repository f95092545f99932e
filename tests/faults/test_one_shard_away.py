"""One of four shards swallows whatever it is sent: its users hear so in time, and nobody else notices."""

import asyncio
import time
from pathlib import Path

import pytest

from common.breaker_settings import SHARD
from tests.faults.conftest import Record
from tests.support.faulty import faulty_cluster
from tests.support.generator import Plan, generating, result_file
from tests.support.proxy import Fault

AWAY = "shard-0"
TIMEOUT_S = 2.0
# Whoever waits for a shard that is away does so for about the whole of his deadline.
_HANGING_MS = TIMEOUT_S * 1000 / 2
# By the breaker; or, as long as calls hang that began before it opened, by the limit of calls in flight.
_REFUSED = ("UNAVAILABLE BREAKER_OPEN", "RESOURCE_EXHAUSTED OVERLOADED")
_FAILED = ("DEADLINE_EXCEEDED", "UNAVAILABLE OUTCOME_UNKNOWN")
_FAILURES = SHARD.consecutive_failures
_CLEAN = ("OK", "UNAVAILABLE ", "DEADLINE_EXCEEDED", *_REFUSED)


async def scenario(
    record: Record, tmp_path: Path, *, before_s: float, away_s: float, after_s: float, whole: bool
) -> None:
    async with faulty_cluster(shards=4) as faulty:
        users = {shard.shard_id: faulty.users(shard.shard_id, 20) for shard in faulty.topology.shards}
        plan = Plan(faulty.address, users, rate=120, timeout_s=TIMEOUT_S, file=result_file(tmp_path, "calls"))
        async with generating(plan) as generator:
            await generator.go()
            began = time.monotonic() + 3  # Connections, plans and caches are warm by then.
            await asyncio.sleep(3 + before_s)
            gone = time.monotonic()
            await faulty.proxies.inflict(Fault.BLACK_HOLE, AWAY)
            await asyncio.sleep(away_s)
            await faulty.proxies.heal(AWAY)
            healed = time.monotonic()
            await asyncio.sleep(after_s)
            calls = await generator.stop()
    before = calls.where(but_group=AWAY, since=began, until=gone)
    during = calls.where(but_group=AWAY, since=gone, until=healed)
    others_failed = calls.where(but_group=AWAY, since=began, outcome="failed").counts()
    mine = calls.where(group=AWAY, since=gone, until=healed)
    # From the first refusal on. Those before it found out that nobody answers; of the others, a few are let through to
    # find out whether somebody does again.
    opened = min(mine.where(outcome="UNAVAILABLE BREAKER_OPEN").ends())
    since_open = mine.where(since=opened)
    at_once = since_open.where(outcome=_REFUSED)
    by_breaker = since_open.where(outcome="UNAVAILABLE BREAKER_OPEN")
    failed_after = calls.where(group=AWAY, since=healed, outcome="failed").rows["at"]
    back_s = float(failed_after.max() - healed) if len(failed_after) else 0.0
    record(
        "one of 4 shards black-holed for 20 s",
        "users of the others: 0 errors, p99 < 2 times before; its own: an answer or a clean error within the deadline, "
        "at once when the breaker is open; back within 2 s",
        f"others: {others_failed.total()} of {len(before) + len(during)} failed, "
        f"p99 {before.percentile_ms(99):.0f} → {during.percentile_ms(99):.0f} ms; "
        f"its own: breaker open after {opened - gone:.1f} s, then {len(at_once)} of {len(since_open)} refused "
        f"(p50 {at_once.percentile_ms(50):.1f} ms, p95 {at_once.percentile_ms(95):.0f} ms, "
        f"by the breaker {by_breaker.percentile_ms(95):.0f} ms), "
        f"longest {mine.longest_s():.2f} s of {TIMEOUT_S:g} s; all well {back_s:.1f} s after healing",
    )
    print(f"its own: {dict(mine.counts())}; after: {calls.where(group=AWAY, since=healed).counts()}")
    assert others_failed == {}
    # In the few seconds of the short run, each moment in which the machine stands still is many calls: there, hardly
    # anybody else waits as those who wait for nothing.
    if whole:
        assert during.percentile_ms(99) < 2 * before.percentile_ms(99)
    else:
        assert during.percentile_ms(90) < _HANGING_MS
    # What a generator on a busy machine may add to a deadline before it is told.
    grace_s = 0.5 if whole else 2.0
    assert mine.longest_s() < TIMEOUT_S + grace_s
    assert all(name.startswith(_CLEAN) for name in mine.counts())
    # As soon as as many calls of a kind have failed as open its breaker.
    failed = [calls.where(group=AWAY, since=gone, outcome=_FAILED, kinds=(kind,)).ends() for kind in calls.kinds]
    enough = min(float(sorted(ends)[_FAILURES - 1]) for ends in failed if len(ends) >= _FAILURES)
    assert opened - enough < grace_s
    assert len(at_once) > 0.8 * len(since_open)
    patience = 1 if whole else 5
    assert at_once.percentile_ms(50) < 20 * patience
    # Nobody waits for a place where nobody is asked. Some were asked to find out, given up, and refused when they were
    # tried again: of a few seconds' refusals they are one in twenty.
    assert by_breaker.percentile_ms(95 if whole else 50) < 20 * patience
    assert back_s < 2 * patience


async def test_a_shard_that_is_away_costs_its_own_users_only(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, before_s=3, away_s=6, after_s=4, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_shard_that_is_away_for_20_s_costs_its_own_users_only(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, before_s=20, away_s=20, after_s=10, whole=True)
