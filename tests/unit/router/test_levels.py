"""What the levels are decided from, and what an operator's word does."""

from common.level import Level
from common.topology import CLUSTER
from router.guard import Guards
from router.levels import Levels
from tests.support.clock import Clock


def looked(levels: Levels, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        levels.look()
        clock.pass_(1)


def test_a_full_pool_reduces_its_shard_and_nobody_else() -> None:
    clock = Clock()
    guards = Guards(clock)
    levels = Levels(guards, clock)
    for shard_id in ("shard-0", "shard-1", "shard-2"):
        guards.of(shard_id)
    levels.pool_use["shard-0"] = 1.0
    looked(levels, clock, 7)
    assert levels.vitals["shard-0"].pool_use == 1.0
    assert [levels.decider(name).level for name in ("shard-0", "shard-1", CLUSTER)] == [
        Level.REDUCED,
        Level.NORMAL,
        Level.NORMAL,
    ]
    del levels.pool_use["shard-0"]
    looked(levels, clock, 40)
    assert levels.of(["shard-0"]) is Level.NORMAL


def test_what_an_operator_sets_holds_whatever_is_seen_and_ends_with_his_word() -> None:
    clock = Clock()
    guards = Guards(clock)
    levels = Levels(guards, clock)
    guards.of("shard-0")
    levels.override({"shard-0": Level.READONLY, CLUSTER: Level.MAINTENANCE})
    looked(levels, clock, 100)
    assert not levels.effects("shard-0").allow_writes
    assert not levels.effects().serving
    levels.override({"shard-0": Level.READONLY})
    assert levels.effects().serving
    assert levels.of(["shard-0"]) is Level.READONLY
    assert levels.effects("shard-1").allow_writes
    levels.override({})
    assert levels.of(["shard-0"]) is Level.NORMAL
    assert levels.effects("shard-0").allow_writes
