"""What shards tell of slots that they gave away changes a topology as the catalog would have."""

from hypothesis import given
from hypothesis import strategies as st

from common import departure
from common.departure import Departure
from common.errors import WrongShard
from common.status import from_status, to_status
from common.topology import Shard, SlotRange, Topology

_TOPOLOGY = Topology(
    "cluster",
    3,
    (Shard("a", "127.0.0.1:1"), Shard("b", "127.0.0.1:2")),
    (SlotRange(0, 8191, "a"), SlotRange(8192, 16383, "b")),
)


def _gone(first: int, last: int, source: str, target: str, epoch: int) -> Departure:
    return Departure(first, last, source, target, f"{target}:1", epoch, 1, epoch * 100)


def test_slots_are_where_their_shard_says_that_they_went() -> None:
    after = _TOPOLOGY.after([_gone(100, 200, "a", "new", 5)])
    assert (after.epoch, after.owner(100).address, after.owner(200).shard_id) == (5, "new:1", "new")
    assert (after.owner(99).shard_id, after.owner(201).shard_id) == ("a", "a")
    assert [(c.source, c.target, c.lsn) for c in after.cutovers] == [("a", "new", 500)]


def test_of_two_that_speak_of_a_slot_the_later_holds() -> None:
    later, earlier = _gone(100, 200, "b", "c", 9), _gone(100, 200, "a", "b", 5)
    assert _TOPOLOGY.after([later, earlier]).owner(150).shard_id == "c"


def test_departures_survive_the_wire() -> None:
    told = (_gone(1, 2, "a", "b", 7), _gone(5, 9, "a", "c", 8))
    back = from_status(to_status(WrongShard("moved", epoch=8, departures=told, fenced=True)))
    assert isinstance(back, WrongShard)
    assert (back.departures, back.fenced, back.epoch) == (told, True, 8)


@given(st.text(max_size=40))
def test_garbled_ones_are_none(text: str) -> None:
    assert departure.from_text(text) == () or text.strip() == "[]"
