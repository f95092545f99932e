"""Freshness: whether a standby has replayed what a read asks for. Pure.

It is decided before the read, from a statement of its own on the connection that then serves the read. In one statement
it would be wrong: the rows would come from a snapshot that is older than the check (docs/decisions/0010-replicas.md).
"""

import math
from dataclasses import dataclass

from memshard.internal.v1 import shard_pb2


@dataclass(frozen=True, slots=True)
class Replayed:
    """How far a server has replayed its primary's log. With the defaults: no heartbeat has come yet."""

    in_recovery: bool
    lsn: int
    timeline: int = 0
    """Of the newest heartbeat that was replayed."""
    age_s: float = math.inf
    """Since the newest heartbeat, by the two servers' clocks."""


def is_fresh(wanted: shard_pb2.Freshness, replayed: Replayed) -> bool:
    """Whether a read may be served.

    A heartbeat of a later timeline than a position's means that all that was acknowledged before the position has been
    replayed: it lies before the fork. Of a server that is no standby any more nothing is known: it may have been left
    behind by the others.
    """
    if not replayed.in_recovery:
        return False
    if wanted.HasField("position"):
        position = wanted.position
        if (replayed.timeline, replayed.lsn) < (position.timeline, position.lsn):
            return False
    return not wanted.max_staleness_ms or replayed.age_s * 1000 <= wanted.max_staleness_ms


def is_serving(replayed: Replayed, max_lag_s: float) -> bool:
    """Whether a replica should be asked anything."""
    return replayed.in_recovery and replayed.age_s <= max_lag_s
