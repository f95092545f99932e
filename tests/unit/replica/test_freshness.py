"""What a standby may answer: exactly when it has replayed what was asked for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshard.internal.v1 import shard_pb2
from replica import lag
from replica.freshness import Replayed, is_fresh, is_serving

lsns = st.integers(0, 2**63 - 1)
timelines = st.integers(1, 2**31 - 1)


def _at(timeline: int, lsn: int) -> shard_pb2.Freshness:
    return shard_pb2.Freshness(position=shard_pb2.ShardPosition(shard_id="s", timeline=timeline, lsn=lsn))


@pytest.mark.parametrize(
    ("asked", "has", "fresh"),
    [
        ((1, 100), (1, 100), True),
        ((1, 100), (1, 99), False),
        ((1, 100), (2, 1), True),  # What timeline 1 acknowledged is before the fork, and so is replayed.
        ((2, 1), (1, 100), False),
        ((1, 100), (0, 100), False),  # No heartbeat yet: of which timeline the log is, is not known.
    ],
)
def test_a_position_is_replayed_on_its_own_timeline_or_a_later_one(
    asked: tuple[int, int], has: tuple[int, int], fresh: bool
) -> None:
    assert is_fresh(_at(*asked), Replayed(True, has[1], has[0], 0.1)) is fresh


@given(timelines, lsns, timelines, lsns, st.floats(0, 1e6))
def test_what_is_fresh_stays_so_when_more_is_replayed(
    timeline: int, lsn: int, newer: int, further: int, age_s: float
) -> None:
    wanted = _at(timeline, lsn)
    first, second = sorted([(timeline, lsn), (newer, further)])
    if is_fresh(wanted, Replayed(True, first[1], first[0], age_s)):
        assert is_fresh(wanted, Replayed(True, second[1], second[0], age_s))


@given(st.integers(1, 10**6), st.floats(0, 10**6))
def test_staleness_is_the_age_of_the_newest_heartbeat(bound_ms: int, age_s: float) -> None:
    wanted = shard_pb2.Freshness(max_staleness_ms=bound_ms)
    assert is_fresh(wanted, Replayed(True, 1, 1, age_s)) is (age_s * 1000 <= bound_ms)


def test_both_a_position_and_a_bound_have_to_be_kept() -> None:
    wanted = _at(1, 100)
    wanted.max_staleness_ms = 1000
    assert is_fresh(wanted, Replayed(True, 100, 1, 0.5))
    assert not is_fresh(wanted, Replayed(True, 99, 1, 0.5))
    assert not is_fresh(wanted, Replayed(True, 100, 1, 1.5))


@pytest.mark.parametrize("wanted", [_at(1, 1), shard_pb2.Freshness(max_staleness_ms=10**6), shard_pb2.Freshness()])
def test_a_server_that_is_no_standby_any_more_is_never_fresh(wanted: shard_pb2.Freshness) -> None:
    assert not is_fresh(wanted, Replayed(False, 2**40, 9, 0.0))


@pytest.mark.parametrize(
    ("replayed", "serving"),
    [
        (Replayed(True, 1, 1, 29.9), True),
        (Replayed(True, 1, 1, 30.1), False),
        (Replayed(True, 1), False),
        (Replayed(False, 1, 1, 0.0), False),
    ],
)
def test_a_replica_serves_as_a_standby_that_is_not_too_far_behind(replayed: Replayed, serving: bool) -> None:
    assert is_serving(replayed, 30.0) is serving


def test_lag_travels_in_milliseconds_also_when_it_is_unknown_or_clocks_differ() -> None:
    assert [lag.in_ms(age_s) for age_s in (0.0004, 1.5, -3.0)] == [0, 1500, 0]
    assert shard_pb2.DescribeResponse(lag_ms=lag.in_ms(math.inf)).lag_ms > 10**12
