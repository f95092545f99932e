"""Latencies in buckets: never told too low, never more than a thousandth too high, the same merged as together."""

import math

from hypothesis import given
from hypothesis import strategies as st

from loadtest.histogram import Histogram, merged

_SECONDS = st.lists(st.floats(1e-6, 3600), min_size=1, max_size=200)


def _of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(_SECONDS, st.floats(0.001, 1))
def test_a_percentile_is_that_of_the_values(values: list[float], share: float) -> None:
    exact = sorted(values)[max(1, math.ceil(share * len(values) - 1e-9)) - 1]
    told = _of(values).percentile(share)
    assert exact - 1e-6 <= told <= exact * 1.001 + 2e-6


@given(_SECONDS, _SECONDS)
def test_merged_is_as_together_also_through_json(one: list[float], other: list[float]) -> None:
    parts = [Histogram.from_json(_of(values).to_json()) for values in (one, other)]
    assert list(merged(parts).values()) == list(_of(one + other).values())
    assert merged(parts).count == len(one) + len(other)


@given(_SECONDS)
def test_ends_and_average(values: list[float]) -> None:
    histogram = _of(values)
    assert math.isclose(histogram.slowest, max(values), rel_tol=0.001, abs_tol=2e-6)
    assert math.isclose(histogram.fastest, min(values), rel_tol=0.001, abs_tol=2e-6)
    assert math.isclose(histogram.average, sum(values) / len(values), rel_tol=0.002, abs_tol=2e-6)


def test_an_empty_one_says_nothing() -> None:
    empty = Histogram()
    assert (empty.count, empty.percentile(0.99), empty.fastest, empty.slowest, empty.average) == (0, 0, 0, 0, 0)


def test_memory_is_bounded() -> None:
    histogram = _of([number * 1e-6 for number in range(0, 100_000_000, 1000)])
    assert len(list(histogram.values())) < 20_000
