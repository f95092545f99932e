"""What is tried against what, how often, and when by itself."""

from hypothesis import given
from hypothesis import strategies as st

from router.findings import Condition, Finding, Report
from router.recovery import EVERY_S, Action, Kind, RateLimit, remedies
from router.self_healing import PATIENCE_S, Patience
from tests.support.clock import Clock

_DEAD = Finding("database", "shard-0", Condition.UNHEALTHY, message="SHARD_UNAVAILABLE")


def tried(*findings: Finding) -> list[tuple[str, str]]:
    return [(action.kind.value, action.subject) for action in remedies(findings)]


def test_a_shard_that_does_not_answer_gets_new_connections_on_both_sides_once() -> None:
    broken = Finding("synthetic", "shard-0", Condition.UNHEALTHY, message="no answer in 5 s")
    assert tried(_DEAD, broken) == [("reconnect", "shard-0"), ("recycle_pool", "shard-0")]


def test_a_replica_and_redis_are_helped_though_they_only_cost_comfort() -> None:
    assert tried(
        Finding("replica", "shard-0/shard-0-replica-1", Condition.DEGRADED, message="does not serve"),
        Finding("redis", "", Condition.DEGRADED, message="REDIS_UNAVAILABLE"),
    ) == [
        ("reconnect", "shard-0/shard-0-replica-1"),
        ("recycle_pool", "shard-0/shard-0-replica-1"),
        ("flush_cache", ""),
    ]


def test_what_is_well_or_slow_or_full_or_wanted_so_is_left_alone() -> None:
    for finding in (
        Finding("database", "shard-0", Condition.HEALTHY, 1.0),
        Finding("database", "shard-0", Condition.UNKNOWN),
        Finding("replica", "shard-0/shard-0-replica-1", Condition.DEGRADED, 20_000.0, "ms"),
        Finding("disk", "shard-0", Condition.UNHEALTHY, 0.01, "share"),
        Finding("pool", "shard-0", Condition.DEGRADED, 1.0, "share"),
        Finding("synthetic", "shard-0", Condition.DEGRADED, message="takes no writes, as it was set"),
        Finding("embedder", "", Condition.DEGRADED),
        Finding("catalog", "", Condition.DEGRADED),
    ):
        assert tried(finding) == [], finding


@given(st.lists(st.tuples(st.floats(0, 90), st.sampled_from(list(Kind)), st.sampled_from("ab")), max_size=40))
def test_no_action_is_tried_twice_within_its_time_and_each_is_once_it_is_over(
    wishes: list[tuple[float, Kind, str]],
) -> None:
    clock = Clock()
    limit, last = RateLimit(clock), dict[tuple[Kind, str], float]()
    for wait_s, kind, subject in wishes:
        clock.pass_(wait_s)
        due = clock() - last.get((kind, subject), float("-inf")) >= EVERY_S
        assert limit.admits(Action(kind, subject, "database")) == due
        if due:
            last[kind, subject] = clock()


def test_what_is_wrong_is_acted_upon_by_itself_only_when_it_has_been_so_for_a_while_without_a_break() -> None:
    clock = Clock()
    patience = Patience(clock)
    bad, good = Report((_DEAD,)), Report((Finding("database", "shard-0", Condition.HEALTHY, 1.0),))
    assert not patience.exhausted(bad).findings
    clock.pass_(PATIENCE_S - 1)
    assert not patience.exhausted(bad).findings
    assert not patience.exhausted(good).findings
    assert not patience.exhausted(bad).findings
    clock.pass_(PATIENCE_S)
    assert patience.exhausted(bad).findings == (_DEAD,)
