"""The plan reaches the weights, moves nothing that could stay, and breaks nothing on the way."""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.catalog_moves import handed_over
from common.slots import SLOT_COUNT, as_ranges
from common.topology import Shard, ShardStatus, SlotRange, Topology
from shard.moving.plan import PlanError, plan

_ACTIVE, _DRAINING = ShardStatus.ACTIVE, ShardStatus.DRAINING


def _topology(owners: Mapping[str, list[tuple[int, int]]], shards: list[Shard]) -> Topology:
    ranges = [SlotRange(first, last, shard_id) for shard_id, held in owners.items() for first, last in held]
    return Topology("cluster", 1, tuple(shards), tuple(sorted(ranges, key=lambda owned: owned.first)))


@st.composite
def _topologies(draw: st.DrawFn) -> Topology:
    count = draw(st.integers(1, 6))
    shards = [
        Shard(f"shard-{number}", "127.0.0.1:1", draw(st.integers(1, 5)), draw(st.sampled_from(ShardStatus)))
        for number in range(count)
    ]
    cuts = sorted(draw(st.sets(st.integers(1, SLOT_COUNT - 1), max_size=12)))
    bounds = [0, *cuts, SLOT_COUNT]
    ranges = tuple(
        SlotRange(first, end - 1, f"shard-{draw(st.integers(0, count - 1))}")
        for first, end in itertools.pairwise(bounds)
    )
    return Topology("cluster", 1, tuple(shards), ranges)


def _after(topology: Topology, moves: list[tuple[int, int, str, str]]) -> Topology:
    ranges = list(topology.ranges)
    for first, last, source, target in moves:
        ranges = handed_over(ranges, first, last, source, target)  # Raises when they are not the source's.
    return Topology(topology.cluster_id, topology.epoch + 1, topology.shards, tuple(ranges))


_pins = st.dictionaries(st.integers(0, SLOT_COUNT - 1), st.integers(0, 5).map("shard-{}".format), max_size=5)


@given(_topologies(), _pins, st.sampled_from([1000, 4096, SLOT_COUNT]))
def test_the_plan_reaches_the_weights_with_the_fewest_slots_moved(
    topology: Topology, pins: dict[int, str], max_slots: int
) -> None:
    status = {shard.shard_id: shard.status for shard in topology.shards}
    weights = {shard.shard_id: shard.weight for shard in topology.shards if shard.status is _ACTIVE}
    try:
        moves = plan(topology, pins=pins, max_slots=max_slots)
    except PlanError:
        assert not weights
        return
    drained = {shard_id for shard_id in status if status[shard_id] is _DRAINING}
    # A shard that is draining keeps nothing, whoever is pinned to it, and wherever its slots are pinned to.
    pins = {
        slot: shard_id
        for slot, shard_id in pins.items()
        if shard_id not in drained and (status.get(shard_id) is _ACTIVE or topology.owner(slot).shard_id not in drained)
    }
    after = _after(topology, [(m.first, m.last, m.source, m.target) for m in moves])
    assert all(1 <= move.slots <= max_slots for move in moves)
    assert all(status[move.source] in (_ACTIVE, _DRAINING) and status[move.target] is _ACTIVE for move in moves)
    moved = Counter(slot for move in moves for slot in range(move.first, move.last + 1))
    assert not moved or max(moved.values()) == 1

    def free(where: Topology, shard_id: str) -> int:
        return sum(slot not in pins for first, last in where.ranges_of(shard_id) for slot in range(first, last + 1))

    total = sum(free(topology, s) for s in status if status[s] in (_ACTIVE, _DRAINING))
    exact = {shard_id: total * weight / sum(weights.values()) for shard_id, weight in weights.items()}
    for shard_id in weights:
        assert abs(free(after, shard_id) - exact[shard_id]) < 1
    if weights:
        assert all(after.slot_count(shard_id) == 0 for shard_id in drained)
    # No plan moves less: whoever has more than its share rounded up has to give the rest.
    surplus = sum(max(0, free(topology, s) - free(after, s)) for s in status if status[s] in (_ACTIVE, _DRAINING))
    assert sum(slot not in pins for slot in moved) == surplus
    for slot, shard_id in pins.items():
        if status.get(shard_id) is _ACTIVE and status[topology.owner(slot).shard_id] in (_ACTIVE, _DRAINING):
            assert after.owner(slot).shard_id == shard_id
        else:
            assert after.owner(slot) == topology.owner(slot)


@given(_topologies())
def test_what_is_balanced_stays(topology: Topology) -> None:
    if not any(shard.status is _ACTIVE for shard in topology.shards):
        return
    after = _after(topology, [(m.first, m.last, m.source, m.target) for m in plan(topology)])
    assert plan(after) == []


def test_four_shards_from_two_move_half_of_the_slots() -> None:
    shards = [Shard(f"shard-{number}", "127.0.0.1:1") for number in range(4)]
    topology = _topology({"shard-0": [(0, 8191)], "shard-1": [(8192, 16383)]}, shards)
    moves = plan(topology, max_slots=4096)
    assert [(m.first, m.last, m.source, m.target) for m in moves] == [
        (4096, 8191, "shard-0", "shard-2"),
        (12288, 16383, "shard-1", "shard-3"),
    ]


def test_draining_needs_somebody_to_take_the_slots() -> None:
    topology = _topology({"a": [(0, SLOT_COUNT - 1)]}, [Shard("a", "127.0.0.1:1")])
    with pytest.raises(PlanError):
        plan(topology, draining=["a"])


def test_a_draining_shard_keeps_nobody_who_is_pinned_to_it() -> None:
    shards = [Shard("a", "127.0.0.1:1"), Shard("b", "127.0.0.1:1", status=_DRAINING)]
    topology = _topology({"a": [(0, 99)], "b": [(100, SLOT_COUNT - 1)]}, shards)
    moves = plan(topology, pins={50: "b", 200: "b"}, max_slots=SLOT_COUNT)
    assert [(m.first, m.last, m.source, m.target) for m in moves] == [(100, SLOT_COUNT - 1, "b", "a")]


@pytest.mark.parametrize("status", [ShardStatus.READONLY, ShardStatus.MAINTENANCE])
def test_a_draining_shard_keeps_no_slot_that_is_pinned_to_a_shard_that_takes_none(status: ShardStatus) -> None:
    """It goes elsewhere meanwhile, and from there where it belongs."""
    kept = Shard("a", "127.0.0.1:1", status=status)
    shards = [kept, Shard("b", "127.0.0.1:1", status=_DRAINING), Shard("c", "127.0.0.1:1")]
    topology = _topology({"a": [(0, 99)], "b": [(200, 200)], "c": [(100, 199), (201, SLOT_COUNT - 1)]}, shards)
    pins = {150: "a", 200: "a"}
    moves = plan(topology, pins=pins)
    assert [(m.first, m.last, m.source, m.target) for m in moves] == [(200, 200, "b", "c")]
    after = _after(topology, [(200, 200, "b", "c")])
    assert plan(after, pins=pins) == []
    taking = replace(after, shards=(replace(kept, status=_ACTIVE, weight=1), *shards[1:]))
    homeward = {(m.first, m.target) for m in plan(taking, pins=pins) if m.target == "a" and m.slots == 1}
    assert {(150, "a"), (200, "a")} <= homeward


@given(_topologies(), st.integers(0, SLOT_COUNT - 1), st.integers(1, 3000))
def test_handing_over_changes_the_owner_of_these_slots_only(topology: Topology, first: int, count: int) -> None:
    giver = topology.owner(first).shard_id
    last = first
    while last + 1 < min(first + count, SLOT_COUNT) and topology.owner(last + 1).shard_id == giver:
        last += 1
    after = handed_over(topology.ranges, first, last, giver, "new")
    owned = [slot for r in after for slot in range(r.first, r.last + 1)]
    assert owned == list(range(SLOT_COUNT))
    assert as_ranges(s for r in after if r.shard_id == "new" for s in range(r.first, r.last + 1)) == [(first, last)]
    assert all(one.shard_id != other.shard_id for one, other in itertools.pairwise(after))
