"""What a router's page says, and when it says nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from common.config import RouterSettings
from common.moves import Progress
from common.slots import SLOT_COUNT
from common.topology import Shard, SlotRange, Topology
from router.metrics import RouterMetrics
from router.shards import Shards

_MOVES = {"memory_moves", "memory_moves_unattended", "memory_moves_overdue", "memory_moving_slots"}
TOPOLOGY = Topology("c", 1, (Shard("a", "a:1"),), (SlotRange(0, SLOT_COUNT - 1, "a"),))


def test_of_a_shard_that_has_left_nothing_is_told() -> None:
    shards = Shards(RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere")))
    shards.levels.pool_use.update({"a": 0.5, "left": 0.9})
    watch: Any = SimpleNamespace(topology=TOPOLOGY)
    nothing: Any = None
    metrics = RouterMetrics(watch, shards, nothing, nothing, nothing, nothing, nothing)
    (pools,) = [family for family in metrics._levels() if family.name == "memory_shard_pool_usage"]
    assert [(sample.labels["shard"], sample.value) for sample in pools.samples] == [("a", 0.5)]


@pytest.mark.parametrize(("age_s", "told"), [(None, False), (0.0, True), (59.0, True), (61.0, False)])
def test_moves_are_told_while_they_are_known(age_s: float | None, told: bool) -> None:
    """Of a catalog that is away nobody knows how moves go on: an old number would be taken for one of now."""
    moving = SimpleNamespace(age_s=age_s, progress=Progress())
    watch: Any = SimpleNamespace(moving=moving, topology=TOPOLOGY)
    nothing: Any = None
    metrics = RouterMetrics(watch, nothing, nothing, nothing, nothing, nothing, nothing)
    names = {family.name for family in metrics._moves()}
    assert names == (_MOVES if told else set())
