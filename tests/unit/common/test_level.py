"""Levels are entered for what lasts and left for what lasts, and never flap or stick in between."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.level import WHAT_EACH_LEVEL_DOES, Effects, Fallback, Level, LevelDecider, LevelSettings
from common.vitals import Vitals
from memshard.v1 import memory_pb2 as pb
from tests.support.clock import Clock
from tests.unit.common.looks import ANY_VITALS, SHARE

_WELL = Vitals()
_SETTINGS = LevelSettings()
_NORMAL, _REDUCED, _ESSENTIAL = Level.NORMAL, Level.REDUCED, Level.ESSENTIAL


def _look(decider: LevelDecider, clock: Clock, vitals: Vitals, seconds: float) -> list[Level]:
    """The levels while `vitals` are seen every second, now and for `seconds` more."""
    levels = [decider.observe(vitals)]
    for _ in range(int(seconds)):
        clock.pass_(1.0)
        levels.append(decider.observe(vitals))
    return levels


@pytest.mark.parametrize(
    ("vitals", "expected"),
    [
        (Vitals(error_rate=0.049), _NORMAL),
        (Vitals(error_rate=0.05), _REDUCED),
        (Vitals(error_rate=0.1), _ESSENTIAL),
        (Vitals(p99_latency_s=0.199), _NORMAL),
        (Vitals(p99_latency_s=0.2), _REDUCED),
        (Vitals(p99_latency_s=0.5), _ESSENTIAL),
        (Vitals(open_breakers=0.24), _NORMAL),
        (Vitals(open_breakers=0.25), _REDUCED),
        (Vitals(open_breakers=0.5), _ESSENTIAL),
        (Vitals(pool_use=0.94), _NORMAL),
        (Vitals(pool_use=1.0), _REDUCED),
        (Vitals(shed_share=1.0), _NORMAL),
        (Vitals(cpu=1.0), _NORMAL),
        (Vitals(memory=1.0), _NORMAL),
        (Vitals(cpu=1.0, memory=1.0, p99_latency_s=0.199, shed_share=0.049), _NORMAL),
        (Vitals(cpu=0.74, shed_share=0.05), _NORMAL),
        (Vitals(cpu=0.75, shed_share=0.05), _REDUCED),
        (Vitals(cpu=1.0, shed_share=1.0), _REDUCED),
        (Vitals(cpu=1.0, p99_latency_s=0.49), _REDUCED),
        (Vitals(cpu=0.89, p99_latency_s=0.49, shed_share=1.0), _REDUCED),
        (Vitals(cpu=0.90, p99_latency_s=0.2, shed_share=0.05), _ESSENTIAL),
        (Vitals(memory=0.84, shed_share=0.05), _NORMAL),
        (Vitals(memory=0.85, shed_share=0.05), _REDUCED),
        (Vitals(memory=1.0, p99_latency_s=0.49, shed_share=1.0), _REDUCED),
    ],
    ids=repr,
)
def test_each_figure_asks_for_its_level_at_its_thresholds(vitals: Vitals, expected: Level) -> None:
    assert _SETTINGS.asked_for(vitals) == expected


@given(ANY_VITALS, ANY_VITALS, st.floats(0.1, 1))
def test_what_is_worse_never_asks_for_less(one: Vitals, other: Vitals, factor: float) -> None:
    worse = _worse(one, other)
    assert _SETTINGS.asked_for(one, factor) <= _SETTINGS.asked_for(worse, factor)
    assert _SETTINGS.asked_for(one) <= _SETTINGS.asked_for(one, factor)


def _worse(one: Vitals, other: Vitals) -> Vitals:
    return Vitals(**{f.name: max(getattr(one, f.name), getattr(other, f.name)) for f in fields(Vitals)})


@given(ANY_VITALS, SHARE, SHARE)
def test_cpu_and_memory_alone_change_nothing(vitals: Vitals, cpu: float, memory: float) -> None:
    quiet = replace(vitals, p99_latency_s=min(vitals.p99_latency_s, 0.199), shed_share=min(vitals.shed_share, 0.049))
    assert _SETTINGS.asked_for(replace(quiet, cpu=cpu, memory=memory)) == _SETTINGS.asked_for(
        replace(quiet, cpu=0.0, memory=0.0)
    )


@given(SHARE, SHARE, st.floats(0, 5), SHARE)
def test_cpu_and_memory_with_one_witness_never_go_beyond_reduced(
    cpu: float, memory: float, p99_latency_s: float, shed_share: float
) -> None:
    slow = Vitals(cpu=cpu, memory=memory, p99_latency_s=p99_latency_s)
    assert _SETTINGS.asked_for(slow) == _SETTINGS.asked_for(Vitals(p99_latency_s=p99_latency_s))
    assert _SETTINGS.asked_for(Vitals(cpu=cpu, memory=memory, shed_share=shed_share)) <= _REDUCED
    assert _SETTINGS.asked_for(Vitals(memory=memory, p99_latency_s=0.3, shed_share=shed_share)) == _REDUCED


_SIGHT = st.lists(st.tuples(st.integers(1, 16), ANY_VITALS), max_size=40)


@given(_SIGHT)
def test_cpu_and_memory_alone_never_move_a_decider(sight: list[tuple[int, Vitals]]) -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    for seconds, vitals in sight:
        clock.pass_(seconds)
        decider.observe(Vitals(cpu=vitals.cpu, memory=vitals.memory))
        assert decider.level == _NORMAL


@given(_SIGHT, st.data())
def test_of_two_shards_the_one_that_is_never_better_is_never_at_a_lower_level(
    sight: list[tuple[int, Vitals]], data: st.DataObject
) -> None:
    clock = Clock()
    better, worse = LevelDecider(clock), LevelDecider(clock)
    for seconds, vitals in sight:
        clock.pass_(seconds)
        assert better.observe(vitals) <= worse.observe(_worse(vitals, data.draw(ANY_VITALS)))


@given(_SIGHT, ANY_VITALS)
def test_enough_healthy_looks_always_end_in_normal(sight: list[tuple[int, Vitals]], well: Vitals) -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    for seconds, vitals in sight:
        clock.pass_(seconds)
        decider.observe(vitals)
    well = replace(
        well,
        error_rate=min(well.error_rate, 0.039),
        p99_latency_s=min(well.p99_latency_s, 0.159),
        open_breakers=min(well.open_breakers, 0.19),
        pool_use=min(well.pool_use, 0.75),
        shed_share=min(well.shed_share, 0.039),
        writes_down=False,
    )
    levels = _look(decider, clock, well, seconds=31)
    assert levels[-1] == _NORMAL
    assert all(before >= after for before, after in pairwise(levels))


_BAND = st.floats(0.8, 1.0, exclude_max=True)


@given(st.sampled_from([_NORMAL, _REDUCED]), st.lists(st.tuples(st.integers(1, 16), _BAND, _BAND, _BAND), max_size=60))
def test_noise_between_the_thresholds_changes_nothing(
    level: Level, noise: list[tuple[int, float, float, float]]
) -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    limit = {_NORMAL: (0.05, 0.2, 0.25), _REDUCED: (0.1, 0.5, 0.5)}[level]
    if level is _REDUCED:
        _look(decider, clock, Vitals(error_rate=0.06), seconds=5)
    for seconds, *factors in noise:
        clock.pass_(seconds)
        errors, latency, breakers = (of * factor for of, factor in zip(limit, factors, strict=True))
        assert decider.observe(Vitals(error_rate=errors, p99_latency_s=latency, open_breakers=breakers)) == level


@given(st.lists(st.tuples(st.integers(1, 8), ANY_VITALS), max_size=80))
def test_whatever_is_seen_a_level_lasts(sight: list[tuple[int, Vitals]]) -> None:
    """No level is entered and left again within half a minute."""
    clock = Clock()
    decider = LevelDecider(clock)
    entered: dict[Level, float] = {}
    for seconds, vitals in sight:
        clock.pass_(seconds)
        before = decider.level
        after = decider.observe(replace(vitals, writes_down=False))
        for level in (_REDUCED, _ESSENTIAL):
            if before < level <= after:
                entered[level] = clock.now
            elif after < level <= before:
                assert clock.now - entered[level] >= 30.0


def test_a_cause_must_last_before_a_level_is_entered() -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    assert _look(decider, clock, Vitals(error_rate=0.06), seconds=4)[-1] == _NORMAL
    clock.pass_(1.0)
    assert decider.observe(_WELL) == _NORMAL
    clock.pass_(1.0)
    assert _look(decider, clock, Vitals(error_rate=0.06), seconds=5) == [_NORMAL] * 5 + [_REDUCED]


def test_a_peak_within_a_lasting_cause_enters_only_what_lasted() -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    _look(decider, clock, Vitals(error_rate=0.06), seconds=2)
    _look(decider, clock, Vitals(error_rate=0.5), seconds=2)
    assert _look(decider, clock, Vitals(error_rate=0.06), seconds=2)[-1] == _REDUCED


def test_levels_are_left_one_after_the_other_as_it_gets_better() -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    assert _look(decider, clock, Vitals(error_rate=0.5), seconds=5)[-1] == _ESSENTIAL
    # Below a tenth, though not below four fifths of one.
    assert _look(decider, clock, Vitals(error_rate=0.09), seconds=100)[-1] == _ESSENTIAL
    assert _look(decider, clock, Vitals(error_rate=0.07), seconds=30)[-1] == _REDUCED
    assert _look(decider, clock, Vitals(error_rate=0.041), seconds=100)[-1] == _REDUCED
    assert _look(decider, clock, Vitals(error_rate=0.039), seconds=30)[-1] == _NORMAL


def test_being_well_must_last_too() -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    _look(decider, clock, Vitals(error_rate=0.06), seconds=5)
    assert _look(decider, clock, _WELL, seconds=29)[-1] == _REDUCED
    decider.observe(Vitals(error_rate=0.06))
    assert _look(decider, clock, _WELL, seconds=29)[-1] == _REDUCED
    assert _look(decider, clock, _WELL, seconds=30)[-1] == _NORMAL


def test_writes_are_refused_only_when_their_path_is_down_for_longer_than_a_failover_takes() -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    assert _look(decider, clock, Vitals(writes_down=True), seconds=29)[-1] == _NORMAL
    assert decider.effects.allow_writes
    assert _look(decider, clock, Vitals(writes_down=True), seconds=2)[-1] == Level.READONLY
    assert not decider.effects.allow_writes
    assert _look(decider, clock, _WELL, seconds=1)[-1] == Level.READONLY
    assert _look(decider, clock, _WELL, seconds=2)[-1] == _NORMAL


def test_read_only_and_overloaded_at_once_does_what_both_do() -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    _look(decider, clock, Vitals(writes_down=True, error_rate=0.5), seconds=31)
    assert decider.level == Level.READONLY
    assert decider.effects == WHAT_EACH_LEVEL_DOES[_ESSENTIAL].strictest(WHAT_EACH_LEVEL_DOES[Level.READONLY])
    assert decider.effects.patience == 0.6
    assert not decider.effects.allow_writes


@given(st.sampled_from(Level), _SIGHT)
def test_an_operators_level_wins_over_whatever_is_seen(level: Level, sight: list[tuple[int, Vitals]]) -> None:
    clock = Clock()
    overridden, decider = LevelDecider(clock), LevelDecider(clock)
    overridden.override = level
    for seconds, vitals in sight:
        clock.pass_(seconds)
        assert overridden.observe(vitals) == level
        assert overridden.effects == WHAT_EACH_LEVEL_DOES[level]
        decider.observe(vitals)
    # Meanwhile it has gone on looking.
    overridden.override = None
    assert overridden.level == decider.level
    assert overridden.effects == decider.effects


@given(_SIGHT)
def test_maintenance_is_only_entered_by_hand(sight: list[tuple[int, Vitals]]) -> None:
    clock = Clock()
    decider = LevelDecider(clock)
    for seconds, vitals in sight:
        clock.pass_(seconds)
        assert decider.observe(vitals) < Level.MAINTENANCE
        assert decider.effects.serving


def test_every_level_has_its_row_and_each_row_its_word() -> None:
    assert list(WHAT_EACH_LEVEL_DOES) == list(Level)
    assert [level.value for level in Level] == list(pb.DegradationLevel.values())[1:]
    assert WHAT_EACH_LEVEL_DOES[_NORMAL] == Effects(1.0, 1.0, False, frozenset({Fallback.KEYWORD}), True, True)
    reduced, essential = WHAT_EACH_LEVEL_DOES[_REDUCED], WHAT_EACH_LEVEL_DOES[_ESSENTIAL]
    assert reduced.index_instead_of_exact
    assert reduced.patience < 1 > reduced.batch_factor
    assert essential.fallbacks == {Fallback.KEYWORD, Fallback.MOST_RECENT}
    assert [level for level, effects in WHAT_EACH_LEVEL_DOES.items() if not effects.allow_writes] == [
        Level.READONLY,
        Level.MAINTENANCE,
    ]
    assert [level for level, effects in WHAT_EACH_LEVEL_DOES.items() if not effects.serving] == [Level.MAINTENANCE]


@given(st.lists(st.sampled_from(Level), min_size=1))
def test_effects_join_in_any_order_and_never_loosen(levels: list[Level]) -> None:
    joined = WHAT_EACH_LEVEL_DOES[_NORMAL]
    for level in levels:
        joined = joined.strictest(WHAT_EACH_LEVEL_DOES[level])
    reverse = WHAT_EACH_LEVEL_DOES[_NORMAL]
    for level in reversed(levels):
        reverse = reverse.strictest(WHAT_EACH_LEVEL_DOES[level])
    assert joined == reverse
    for level in levels:
        assert joined.strictest(WHAT_EACH_LEVEL_DOES[level]) == joined
    # From normal to essential each gives up all that the one before does.
    for lower, higher in pairwise([_NORMAL, _REDUCED, _ESSENTIAL]):
        assert WHAT_EACH_LEVEL_DOES[lower].strictest(WHAT_EACH_LEVEL_DOES[higher]) == WHAT_EACH_LEVEL_DOES[higher]
