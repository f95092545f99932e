import pytest

from common.sync_set import Progress, SyncSet
from local.succession import STUCK_AFTER_S, StuckWatch, Succession, succession

A, B, C = "server-a", "server-b", "server-c"
EARLY, LATE = Progress(1, 100), Progress(1, 200)
NEXT_TIMELINE = Progress(2, 50)


def _set(*members: str, following: frozenset[str] | None = None) -> SyncSet:
    return SyncSet("old", frozenset(members), following)


@pytest.mark.parametrize(
    ("sync_set", "reached", "wanted", "expected"),
    [
        # Nobody is sure to have all of it.
        (_set(), {A: LATE}, None, None),
        (_set(A), {}, None, None),
        (_set(A), {B: LATE}, None, None),
        (_set(following=frozenset({A})), {A: LATE}, None, None),
        # The only one, and the most advanced one.
        (_set(A), {A: EARLY}, None, Succession(A, frozenset())),
        (_set(A, B), {A: EARLY, B: LATE}, None, Succession(B, frozenset())),
        (_set(A, B), {A: LATE, B: NEXT_TIMELINE}, None, Succession(B, frozenset())),
        # Two of three wait for one: any two hold one that has all of it, and one alone may not.
        (_set(A, B), {A: LATE}, None, None),
        # Those that have as much are waited for from the start, those behind are not: they could lose what it has.
        (_set(A, B, C), {A: LATE, B: LATE, C: EARLY}, None, Succession(A, frozenset({B}))),
        (_set(A, B), {A: LATE, B: LATE, C: LATE}, None, Succession(A, frozenset({B}))),
        # On request another, if it has as much.
        (_set(A, B), {A: LATE, B: LATE}, B, Succession(B, frozenset({A}))),
        (_set(A, B), {A: EARLY, B: LATE}, A, None),
        (_set(A, B), {A: LATE, B: LATE, C: LATE}, C, None),
    ],
)
def test_who_takes_over(
    sync_set: SyncSet, reached: dict[str, Progress], wanted: str | None, expected: Succession | None
) -> None:
    assert succession(sync_set, reached, wanted) == expected


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_standby_is_stuck_when_it_neither_streams_nor_gets_on_for_a_while() -> None:
    clock = Clock()
    watch = StuckWatch(clock)
    assert not watch.is_stuck(A, EARLY, streams=False)
    clock.now_s = STUCK_AFTER_S - 1
    assert not watch.is_stuck(A, EARLY, streams=False)
    clock.now_s = STUCK_AFTER_S
    assert watch.is_stuck(A, EARLY, streams=False)


def test_a_standby_that_gets_on_streams_or_does_not_answer_is_not_stuck() -> None:
    clock = Clock()
    watch = StuckWatch(clock)
    for number, (progress, streams) in enumerate(
        [(EARLY, False), (LATE, False), (LATE, True), (LATE, False), (None, False), (LATE, False)]
    ):
        clock.now_s = number * (STUCK_AFTER_S - 1)
        assert not watch.is_stuck(A, progress, streams=streams)
    clock.now_s += STUCK_AFTER_S
    watch.forget(A)
    assert not watch.is_stuck(A, LATE, streams=False)
