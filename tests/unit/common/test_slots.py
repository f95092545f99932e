"""Slots: a function that must never change, and shares that are as fair as whole slots allow."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.slots import SLOT_COUNT, as_ranges, share_out, slot_of

_WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=60).map(
    lambda weights: {f"s{i}": weight for i, weight in enumerate(weights)}
)


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        (b"", 14633),
        (b"a", 4158),
        (b"user-1", 9899),
        (b"user-2", 4485),
        ("Zoë".encode(), 7719),
        (b"\xff" * 256, 16299),
    ],
)
def test_slot_of_a_key_never_changes(key: bytes, slot: int) -> None:
    """Slots are stored with every row: another answer here would lose every memory that is stored already."""
    assert slot_of(key) == slot


def test_every_slot_is_in_range_and_keys_spread_evenly() -> None:
    keys = 200_000
    eighths = Counter(slot_of(b"user-%d" % i) * 8 // SLOT_COUNT for i in range(keys))
    assert set(eighths) == set(range(8))
    # The standard deviation of a fair share is about 150; five of them make a miss a matter of one in a million.
    assert all(abs(count - keys / 8) < 750 for count in eighths.values())


@given(_WEIGHTS)
def test_shares_cover_all_slots_once_and_in_one_piece_each(weights: dict[str, int]) -> None:
    ranges = share_out(weights)
    assert list(ranges) == list(weights)
    expected_first = 0
    for first, last in ranges.values():
        assert first == expected_first
        assert last >= first
        expected_first = last + 1
    assert expected_first == SLOT_COUNT


@given(_WEIGHTS)
def test_shares_are_proportional_to_the_weights_within_one_slot(weights: dict[str, int]) -> None:
    ideal = {shard: SLOT_COUNT * weight / sum(weights.values()) for shard, weight in weights.items()}
    if min(ideal.values()) < 1:
        return  # A shard's one slot at least is then more than its share, and somebody pays for it.
    for shard, (first, last) in share_out(weights).items():
        assert abs(last - first + 1 - ideal[shard]) <= 1


@given(st.integers(1, SLOT_COUNT))
def test_equal_weights_differ_by_one_slot_at_most(count: int) -> None:
    sizes = {last - first + 1 for first, last in share_out({str(i): 1 for i in range(count)}).values()}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("weights", [(1, 10**9), (10**9, 1), (1, 1, 10**12, 1, 1), (10**9, 10**9, 1)])
def test_the_lightest_shard_has_a_slot(weights: tuple[int, ...]) -> None:
    ranges = share_out({str(i): weight for i, weight in enumerate(weights)})
    assert min(last - first + 1 for first, last in ranges.values()) == 1
    assert sum(last - first + 1 for first, last in ranges.values()) == SLOT_COUNT


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({}, "no shard"),
        ({"a": 1, "b": 0}, "weight"),
        ({"a": -1}, "weight"),
        ({str(i): 1 for i in range(SLOT_COUNT + 1)}, "more than"),
    ],
)
def test_impossible_shares_are_refused(weights: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        share_out(weights)


@given(st.lists(st.integers(0, 60)))
def test_ranges_are_the_fewest_that_hold_exactly_the_slots(slots: list[int]) -> None:
    ranges = as_ranges(slots)
    assert [slot for first, last in ranges for slot in range(first, last + 1)] == sorted(set(slots))
    # Neighbours that touch would be one range.
    assert all(last + 1 < first for (_, last), (first, _) in itertools.pairwise(ranges))
