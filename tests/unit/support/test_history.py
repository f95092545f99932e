"""The checker of histories finds each kind of disagreement, and nothing where there is none."""

import pytest

from tests.support.history import Found, History


def history() -> History:
    """One memory of each kind."""
    made = History()
    for memory_id in ("kept", "changed", "deleted", "refused", "given up"):
        made.asks(memory_id, f"first {memory_id}")
    made.settled("kept", "first kept")
    made.settled("changed", "first changed")
    made.asks("changed", "second changed")
    made.settled("changed", "second changed")
    made.settled("deleted", "first deleted")
    made.asks("deleted", None)
    made.settled("deleted", None)
    made.refused("refused")
    return made


KEPT, CHANGED = Found("kept", "first kept", 1), Found("changed", "second changed", 2)
GIVEN_UP = Found("given up", "first given up", 1)


@pytest.mark.parametrize("found", [[KEPT, CHANGED], [KEPT, CHANGED, GIVEN_UP]])
def test_what_was_acknowledged_is_right_with_and_without_what_was_given_up(found: list[Found]) -> None:
    made = history()
    made.check(found, whole=True, since=made.moment())
    assert made.wrong == {}


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([KEPT], "lost"),
        ([KEPT, CHANGED, CHANGED], "duplicated"),
        ([KEPT, CHANGED, Found("never", "asked", 1)], "invented"),
        ([KEPT, CHANGED, Found("given up", "something else", 1)], "invented"),
        ([KEPT, CHANGED, Found("deleted", "first deleted", 1)], "deleted or refused, and there"),
        ([KEPT, CHANGED, Found("refused", "first refused", 1)], "deleted or refused, and there"),
        ([KEPT, Found("changed", "first changed", 1)], "an older content"),
        ([KEPT, Found("changed", "second changed", 3)], "a change more or less than acknowledged"),
    ],
)
def test_every_disagreement_is_found(found: list[Found], wrong: str) -> None:
    made = history()
    made.check(found, whole=True, since=made.moment())
    assert made.wrong == {wrong: 1}


def test_what_changed_during_a_read_is_not_held_against_it() -> None:
    made = history()
    since = made.moment()
    made.asks("kept", None)
    made.settled("kept", None)
    made.check([KEPT, CHANGED], whole=True, since=since)
    made.check([CHANGED], whole=True, since=since)
    assert made.wrong == {}
