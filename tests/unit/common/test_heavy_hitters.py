"""Heavy hitters: bounded, never too low, and whoever is asked about most is on the list."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from common.telemetry.heavy_hitters import HeavyHitters
from tests.support.clock import Clock


@given(st.lists(st.integers(0, 40), max_size=400), st.integers(1, 20))
def test_counts_are_bounded_as_the_paper_says(items: list[int], capacity: int) -> None:
    hitters: HeavyHitters[int] = HeavyHitters(capacity, 300.0, Clock())
    for item in items:
        hitters.add(item)
    true, found = Counter(items), {hitter.item: hitter for hitter in hitters.top(capacity)}
    assert len(found) <= capacity
    for item, hitter in found.items():
        assert true[item] <= hitter.count <= true[item] + hitter.error
        assert hitter.error <= len(items) / capacity
    for item, count in true.items():
        assert item in found or count <= len(items) / capacity


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "add", "add", "add", "forget", "halve"]), st.integers(0, 12)), max_size=200
    ),
    st.integers(1, 6),
)
def test_no_count_is_too_low_or_much_too_high_whatever_is_forgotten(
    steps: list[tuple[str, int]], capacity: int
) -> None:
    clock = Clock()
    hitters: HeavyHitters[int] = HeavyHitters(capacity, 1.0, clock)
    true = dict.fromkeys(range(13), 0.0)
    for what, item in steps:
        if what == "add":
            hitters.add(item)
            true[item] += 1
        elif what == "forget":
            hitters.forget(lambda other, item=item: other == item)  # type: ignore[misc]  # mypy takes no default here.
            true[item] = 0.0
        else:
            # Counts are halved with the next call.
            clock.pass_(1.0)
            hitters.add(item)
            true = {other: count / 2 for other, count in true.items()}
            true[item] += 1
        for hitter in hitters.top(capacity):
            assert true[hitter.item] <= hitter.count <= true[hitter.item] + hitter.error
            assert hitter.error <= hitters.total / capacity


def test_who_was_put_out_and_comes_into_room_that_an_erasure_made_is_not_counted_too_low() -> None:
    hitters: HeavyHitters[str] = HeavyHitters(1, 60.0, Clock())
    for item in ("a", "a", "b"):
        hitters.add(item)
    hitters.forget(lambda item: item == "b")
    hitters.add("a")
    assert [(hitter.item, hitter.count, hitter.error) for hitter in hitters.top(1)] == [("a", 3, 2)]


def test_what_those_may_have_been_counted_who_are_not_on_the_list_counts_half_too() -> None:
    clock = Clock()
    hitters: HeavyHitters[str] = HeavyHitters(1, 60.0, clock)
    for item in ("a", "a", "a", "a", "b"):
        hitters.add(item)
    hitters.forget(lambda item: item == "b")
    clock.pass_(120.0)
    hitters.add("c")
    assert [(hitter.item, hitter.count, hitter.error) for hitter in hitters.top(1)] == [("c", 2, 1)]


def test_who_makes_a_tenth_of_the_calls_is_found_among_ten_thousand() -> None:
    hitters: HeavyHitters[str] = HeavyHitters(100, 300.0, Clock())
    for number in range(20_000):
        hitters.add("hot" if number % 10 == 0 else f"user-{number % 10_000}")
    (first, *_) = hitters.top(10)
    assert first.item == "hot"
    assert 2000 <= first.count <= 2000 + 20_000 / 100


def test_the_past_counts_half_after_each_half_life() -> None:
    clock = Clock()
    hitters: HeavyHitters[str] = HeavyHitters(10, 60.0, clock)
    for _ in range(8):
        hitters.add("earlier")
    clock.pass_(120.0)
    for _ in range(3):
        hitters.add("now")
    assert [(hitter.item, hitter.count) for hitter in hitters.top(10)] == [("now", 3), ("earlier", 2)]
    assert hitters.total == 5


def test_what_is_forgotten_is_gone_and_the_rest_stays() -> None:
    hitters: HeavyHitters[str] = HeavyHitters(2, 60.0, Clock())
    for item in ("a", "b", "b"):
        hitters.add(item)
    hitters.forget(lambda item: item == "b")
    assert [hitter.item for hitter in hitters.top(2)] == ["a"]
    for item in ("c", "c", "d"):
        hitters.add(item)
    assert {hitter.item for hitter in hitters.top(2)} == {"c", "d"}
