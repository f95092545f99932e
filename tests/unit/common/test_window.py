import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.window import SlidingCount
from tests.support.clock import Clock

# Binary fractions, so that the sum of steps is exact and a step can end on the edge of a slice.
_STEPS = st.lists(st.tuples(st.integers(0, 200).map(lambda n: n / 16), st.integers(0, 5)), max_size=60)


@given(_STEPS, st.integers(1, 12))
def test_a_count_covers_the_window_and_nothing_older(steps: list[tuple[float, int]], slices: int) -> None:
    clock = Clock()
    count = SlidingCount(1.0, slices, clock)
    counted: list[tuple[float, int]] = []
    for seconds, amount in steps:
        clock.pass_(seconds)
        count.add(amount)
        counted.append((clock.now, amount))
        at_most = sum(n for at, n in counted if clock.now - at < slices)
        at_least = sum(n for at, n in counted if clock.now - at <= slices - 1)
        assert at_least <= count.total() <= at_most
        assert count.total() == sum(n for at, n in counted if int(clock.now) - int(at) < slices)


def test_time_alone_empties_it() -> None:
    clock = Clock()
    count = SlidingCount(1.0, 3, clock)
    count.add(7)
    clock.pass_(2)
    assert count.total() == 7
    clock.pass_(1)
    assert count.total() == 0


def test_what_was_cleared_is_gone_and_what_follows_counts() -> None:
    count = SlidingCount(1.0, 3, Clock())
    count.add(7)
    count.clear()
    count.add()
    assert count.total() == 1


@pytest.mark.parametrize(("slice_s", "slices"), [(0.0, 3), (-1.0, 3), (1.0, 0)])
def test_a_window_of_no_time_is_refused(slice_s: float, slices: int) -> None:
    with pytest.raises(ValueError, match="window"):
        SlidingCount(slice_s, slices, Clock())
