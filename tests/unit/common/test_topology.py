"""A topology: who owns a slot, and that a wrong one cannot be made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.slots import SLOT_COUNT, as_ranges
from common.topology import Shard, SlotRange, Topology

_IDS = ("a", "b", "c")


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """All slots cut into a few ranges, each given to one of three shards."""
    cuts = sorted(draw(st.sets(st.integers(1, SLOT_COUNT - 1), max_size=20)))
    firsts, ends = [0, *cuts], [*cuts, SLOT_COUNT]
    owners = draw(st.lists(st.sampled_from(_IDS), min_size=len(firsts), max_size=len(firsts)))
    return _topology(*((first, end - 1, owner) for first, end, owner in zip(firsts, ends, owners, strict=True)))


def _topology(*ranges: tuple[int, int, str]) -> Topology:
    # Not in the order of their ids, which nothing may depend on.
    shards = tuple(Shard(shard_id, f"127.0.0.1:{9000 + i}") for i, shard_id in enumerate(reversed(_IDS)))
    return Topology("cluster", 7, shards, tuple(SlotRange(*owned) for owned in ranges))


@given(topologies(), st.integers(0, SLOT_COUNT - 1))
def test_owner_is_the_shard_whose_range_has_the_slot(topology: Topology, slot: int) -> None:
    (expected,) = [owned.shard_id for owned in topology.ranges if owned.first <= slot <= owned.last]
    assert topology.owner(slot).shard_id == expected


@given(topologies())
def test_owner_is_right_at_every_edge(topology: Topology) -> None:
    for owned in topology.ranges:
        assert topology.owner(owned.first).shard_id == topology.owner(owned.last).shard_id == owned.shard_id


@given(topologies())
def test_ranges_of_the_serving_shards_are_all_slots_once(topology: Topology) -> None:
    serving = [shard.shard_id for shard in topology.serving()]
    assert serving == sorted(serving)
    assert sum(topology.slot_count(shard_id) for shard_id in serving) == SLOT_COUNT
    spans = sorted(span for shard_id in serving for span in topology.ranges_of(shard_id))
    assert as_ranges(slot for first, last in spans for slot in range(first, last + 1)) == [(0, SLOT_COUNT - 1)]
    assert all(topology.slot_count(shard_id) == 0 for shard_id in _IDS if shard_id not in serving)


def test_shard_without_slots_is_not_asked() -> None:
    assert [shard.shard_id for shard in _topology((0, SLOT_COUNT - 1, "b")).serving()] == ["b"]


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ([], "no owner"),
        ([(1, SLOT_COUNT - 1, "a")], "no owner"),
        ([(0, SLOT_COUNT - 2, "a")], "no owner"),
        ([(0, 10, "a"), (12, SLOT_COUNT - 1, "b")], "no owner"),
        ([(0, 10, "a"), (10, SLOT_COUNT - 1, "b")], "several"),
        ([(0, 10, "a"), (11, 9, "b"), (10, SLOT_COUNT - 1, "b")], "several"),
        ([(100, SLOT_COUNT - 1, "a"), (0, 99, "b")], "no owner"),
        ([(0, SLOT_COUNT, "a")], "no owner"),
        ([(-1, SLOT_COUNT - 1, "a")], "no owner"),
        ([(0, 10, "a"), (11, SLOT_COUNT - 1, "nobody")], "unknown shard nobody"),
    ],
)
def test_ranges_that_are_not_all_slots_once_are_refused(ranges: list[tuple[int, int, str]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _topology(*ranges)


def test_snapshot_cannot_be_changed() -> None:
    topology = _topology((0, SLOT_COUNT - 1, "a"))
    with pytest.raises(AttributeError):
        topology.epoch = 8  # type: ignore[misc]  # That is the point.
