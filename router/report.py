"""What a read says of itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from memshard.v1 import memory_pb2 as pb
from router.levels import Levels
from router.reads import Role


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an answer comes from: which shards were asked for it, and which kinds of servers gave it."""

    shard_ids: frozenset[str]
    served_by: frozenset[Role | Literal["cache"]]
    summary: pb.ShardSummary

    @classmethod
    def of_shards(cls, shard_ids: Iterable[str], served_by: Iterable[Role]) -> "Origin":
        """Of shards that all answered."""
        asked = frozenset(shard_ids)
        return cls(asked, frozenset(served_by), pb.ShardSummary(total=len(asked), succeeded=len(asked)))

    @classmethod
    def of_cache(cls, shard_id: str) -> "Origin":
        """What a shard had said before: now none was asked."""
        return cls(frozenset((shard_id,)), frozenset(("cache",)), pb.ShardSummary())


def report(levels: Levels, origin: Origin, *, fallback: bool = False) -> pb.ReadReport:
    """Where an answer came from, and what it lacks. `fallback`: it was found in another way than was asked for."""
    return pb.ReadReport(
        served_by=[*sorted(origin.served_by), *(["fallback"] if fallback else [])],
        shards=origin.summary,
        degradation_level=pb.DegradationLevel.ValueType(levels.of(origin.shard_ids)),
    )
