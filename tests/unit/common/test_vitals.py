"""What is seen of a shard is what its callees did; what is seen of the cluster is what most shards have."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.vitals import Vitals, of_cluster
from tests.unit.common.looks import ANY_VITALS

_WELL = Vitals()


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 100_000))
def test_what_we_refused_by_ourselves_is_no_error(answered: int, failed: int, shed: int) -> None:
    without = _WELL.with_calls(answered=answered, failed=failed, shed=0, p99_latency_s=0.1)
    refused = _WELL.with_calls(answered=answered, failed=failed, shed=shed, p99_latency_s=0.1)
    assert refused == replace(without, shed_share=refused.shed_share)
    if answered + failed >= 20:
        assert without.error_rate == failed / (answered + failed)
        assert refused.shed_share == shed / (answered + failed + shed)


def test_a_few_calls_say_nothing() -> None:
    assert _WELL.with_calls(answered=0, failed=19, shed=0, p99_latency_s=9.0) == _WELL
    assert _WELL.with_calls(answered=0, failed=0, shed=19, p99_latency_s=0.0) == _WELL
    assert _WELL.with_calls(answered=0, failed=20, shed=0, p99_latency_s=9.0).error_rate == 1.0


def test_what_is_no_call_is_kept() -> None:
    busy = Vitals(cpu=0.9, memory=0.8, pool_use=0.7, open_breakers=0.6, writes_down=True)
    seen = busy.with_calls(answered=90, failed=10, shed=100, p99_latency_s=0.3)
    assert seen == replace(busy, error_rate=0.1, p99_latency_s=0.3, shed_share=0.5)


@given(st.integers(0, 40), ANY_VITALS)
def test_one_shard_never_sets_the_clusters_level(others: int, sick: Vitals) -> None:
    assert of_cluster(_WELL, [sick] + [_WELL] * others) == _WELL


@given(ANY_VITALS, st.lists(ANY_VITALS, min_size=1, max_size=8), ANY_VITALS)
def test_one_shard_brings_the_cluster_at_worst_to_where_another_is(
    own: Vitals, others: list[Vitals], sick: Vitals
) -> None:
    seen = of_cluster(own, [*others, sick])
    assert seen.error_rate <= max(other.error_rate for other in others)
    assert seen.p99_latency_s <= max(other.p99_latency_s for other in others)
    assert seen.open_breakers <= max(other.open_breakers for other in others)
    assert not seen.writes_down
    # The rest is the router's own.
    assert seen.shed_share <= max(own.shed_share, *(other.shed_share for other in others))
    for name in ("pool_use", "cpu", "memory"):
        assert getattr(seen, name) == getattr(own, name)


@pytest.mark.parametrize(
    ("shards", "sick", "counts"),
    [
        (1, 1, False),
        (2, 1, False),
        (2, 2, True),
        (3, 1, False),
        (3, 2, True),
        (4, 2, False),
        (4, 3, True),
        (9, 5, True),
    ],
)
def test_what_more_than_half_of_the_shards_have_the_cluster_has(shards: int, sick: int, counts: bool) -> None:
    bad = Vitals(error_rate=0.3, p99_latency_s=2.0, open_breakers=0.7)
    seen = of_cluster(_WELL, [bad] * sick + [_WELL] * (shards - sick))
    assert seen == (bad if counts else _WELL)


def test_what_is_wrong_with_the_router_is_the_clusters() -> None:
    own = Vitals(cpu=0.95, memory=0.9, shed_share=0.4, pool_use=0.9)
    assert of_cluster(own, [_WELL] * 4) == own
    # Its own errors, latency and breakers are a mixture of all shards'.
    assert of_cluster(Vitals(error_rate=0.25, p99_latency_s=9.0, open_breakers=0.5), [_WELL] * 4) == _WELL
