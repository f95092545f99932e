"""Who has each slot, from what the shards say."""

import pytest

from common.catalog import CatalogError, PlacementStrategy, Precision
from common.slots import SLOT_COUNT
from shard.identity import Identity
from shard.moving.rebuild import Said, owners_of

_KNOWN = Identity("c", "x", "", 3, Precision.HALF, PlacementStrategy.USER_BASED, "english")


def _said(own: range, fenced: range = range(0)) -> Said:
    return Said(_KNOWN, 1, "a", frozenset(own), frozenset(fenced), ())


def test_each_slot_is_of_the_shard_that_takes_its_writes() -> None:
    owners = owners_of({"a": _said(range(100)), "b": _said(range(100, SLOT_COUNT))})
    assert (owners[99], owners[100], len(owners)) == ("a", "b", SLOT_COUNT)


def test_slots_in_the_middle_of_a_hand_over_go_to_one_of_the_two() -> None:
    handed = range(100, 200)
    owners = owners_of({"a": _said(range(100), handed), "b": _said(range(200, SLOT_COUNT), handed)})
    assert {owners[slot] for slot in handed} == {"a"}


def test_a_fence_does_not_outdo_an_owner() -> None:
    owners = owners_of({"a": _said(range(100), range(100, 200)), "b": _said(range(100, SLOT_COUNT))})
    assert owners[150] == "b"


def test_two_owners_or_none_are_an_error() -> None:
    with pytest.raises(CatalogError, match="slot 99 belongs to a and to b"):
        owners_of({"a": _said(range(100)), "b": _said(range(99, SLOT_COUNT))})
    with pytest.raises(CatalogError, match="16000-16383"):
        owners_of({"a": _said(range(16000))})
