"""Hedges go out when a read is late by what was observed, and never more of them than the budget has."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.hedge import HedgeBudget, HedgeSettings, HedgeTimer, LatencyWindow
from tests.support.clock import Clock

_DURATIONS = st.lists(st.floats(1e-4, 60.0), min_size=1, max_size=300)


@given(_DURATIONS, st.floats(0, 1))
def test_a_quantile_is_within_a_twentieth_of_the_true_one(durations: list[float], q: float) -> None:
    window = LatencyWindow(60.0, Clock())
    for duration_s in durations:
        window.add(duration_s)
    true_s = sorted(durations)[max(1, math.ceil(q * len(durations))) - 1]
    estimate_s = window.quantile(q)
    assert estimate_s is not None
    assert abs(estimate_s - true_s) <= 0.05 * true_s * (1 + 1e-9)


@given(st.lists(st.tuples(st.integers(0, 400).map(lambda n: n / 8), st.floats(1e-4, 60.0)), min_size=1, max_size=80))
def test_what_is_older_than_the_window_is_forgotten(samples: list[tuple[float, float]]) -> None:
    clock = Clock(96.0)
    window = LatencyWindow(48.0, clock)
    counted: list[tuple[float, float]] = []
    for seconds, duration_s in samples:
        clock.pass_(seconds)
        window.add(duration_s)
        counted.append((clock.now, duration_s))
        lately = [duration for at, duration in counted if int(clock.now // 8) - int(at // 8) < 6]
        assert window.count == len(lately)
        most_s = window.quantile(1.0)
        assert most_s is not None
        assert abs(most_s - max(lately)) <= 0.05 * max(lately) * (1 + 1e-9)


@pytest.mark.parametrize("duration_s", [0.0, -1.0, 1e-9, 3600.0, math.inf])
def test_durations_outside_are_counted_at_the_ends(duration_s: float) -> None:
    window = LatencyWindow(60.0, Clock())
    window.add(duration_s)
    assert window.quantile(0.95) == pytest.approx(60.0 if duration_s > 1 else 1e-4, rel=0.06)


def test_without_reads_there_is_no_quantile() -> None:
    assert LatencyWindow(60.0, Clock()).quantile(0.95) is None


def test_a_hedge_waits_for_what_95_of_100_reads_take() -> None:
    timer = HedgeTimer(Clock())
    for n in range(1, 1001):
        timer.observe(n / 1000)
    assert timer.delay_s() == pytest.approx(0.95, rel=0.05)


def test_no_hedge_before_enough_reads_were_seen_nor_after_a_long_silence() -> None:
    clock = Clock()
    timer = HedgeTimer(clock)
    for _ in range(99):
        timer.observe(0.02)
    assert timer.delay_s() is None
    timer.observe(0.02)
    clock.pass_(0.1)
    assert timer.delay_s() == pytest.approx(0.02, rel=0.05)
    clock.pass_(61.0)
    assert timer.delay_s() is None


def test_a_hedge_is_not_sent_before_the_floor() -> None:
    timer = HedgeTimer(Clock())
    for _ in range(100):
        timer.observe(0.0005)
    assert timer.delay_s() == 0.005


def test_the_delay_follows_within_a_tenth_of_a_second() -> None:
    clock = Clock()
    timer = HedgeTimer(clock)
    for _ in range(100):
        timer.observe(0.01)
    before = timer.delay_s()
    for _ in range(10):
        timer.observe(1.0)
    clock.pass_(0.099)
    assert timer.delay_s() == before
    clock.pass_(0.002)
    assert timer.delay_s() == pytest.approx(1.0, rel=0.051)


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 15)), max_size=60), st.sampled_from([0.02, 0.1, 0.03]))
def test_hedges_are_a_share_of_all_reads_and_of_any_reads_in_a_row_with_a_small_burst(
    steps: list[tuple[int, int]], share: float
) -> None:
    budget = HedgeBudget(share, burst=10)
    history: list[tuple[int, int]] = []
    for reads, wanted in steps:
        for _ in range(reads):
            budget.read()
        history.append((reads, sum(budget.spend() for _ in range(wanted))))
        total_reads, total_hedges = map(sum, zip(*history, strict=True))
        assert total_hedges <= share * total_reads
        for start in range(len(history)):
            in_a_row = history[start:]
            assert sum(hedges for _, hedges in in_a_row) <= share * sum(reads for reads, _ in in_a_row) + 10


@pytest.mark.parametrize(("share", "expected"), [(0.02, 200), (0.03, 294), (0.5, 5000), (1.0, 10_000)])
def test_the_budget_is_used_to_the_full(share: float, expected: int) -> None:
    budget = HedgeBudget(share)
    hedges = 0
    for _ in range(10_000):
        budget.read()
        hedges += budget.spend()
    assert hedges == expected  # One in 34 reads is the most whole number within 3 %.


@pytest.mark.parametrize("slow_share", [0.0, 0.01, 0.25, 1.0])
def test_hedges_are_at_most_two_in_a_hundred_however_many_servers_are_slow(slow_share: float) -> None:
    rng = random.Random(f"hedges {slow_share}")
    clock = Clock()
    timer, budget = HedgeTimer(clock), HedgeBudget()
    reads, hedges = 20_000, 0
    for n in range(reads):
        clock.pass_(0.005)
        budget.read()
        slow = n > reads // 2 and rng.random() < slow_share
        duration_s = rng.lognormvariate(-5, 0.5) * (10 if slow else 1)
        delay_s = timer.delay_s()
        if delay_s is not None and duration_s > delay_s and budget.spend():
            hedges += 1
        timer.observe(duration_s)
    assert 0 < hedges <= 0.02 * reads


@pytest.mark.parametrize(
    "wrong", [{"quantile": 0.0}, {"quantile": 1.0}, {"floor_s": -1.0}, {"min_samples": 0}, {"window_s": 0.0}], ids=str
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="hedge"):
        replace(HedgeSettings(), **wrong)  # type: ignore[arg-type]  # Wrong on purpose.


@pytest.mark.parametrize(("share", "burst"), [(0.0, 1), (1.1, 1), (0.02, 0)])
def test_a_budget_that_cannot_work_is_refused(share: float, burst: int) -> None:
    with pytest.raises(ValueError, match="hedges"):
        HedgeBudget(share, burst)
