"""What a shard tells of its sync set."""

from shard.durability import Durability
from shard.metrics import of_sync_set


def test_the_sync_set_is_told_by_who_keeps_it() -> None:
    durability = Durability()
    assert [sample.value for family in of_sync_set("shard-0", durability) for sample in family.samples] == [0]
    durability.set_quorum(frozenset({"a", "b"}), "primary", 1)
    (family,) = of_sync_set("shard-0", durability)
    (sample,) = family.samples
    assert (sample.name, sample.labels, sample.value) == ("memory_sync_set_members", {"shard": "shard-0"}, 2)


def test_of_a_sync_set_that_others_keep_nothing_is_told() -> None:
    # 0 would say that writes are on one disk only.
    assert not list(of_sync_set("shard-0", Durability(external=True)))
