"""What a read says of itself."""

from collections.abc import Iterable

from memshard.v1 import memory_pb2 as pb
from router.reads import Role

ONE_SHARD = pb.ShardSummary(total=1, succeeded=1)


def report(shards: pb.ShardSummary, served_by: Iterable[Role], *, fallback: bool = False) -> pb.ReadReport:
    """Where an answer came from, and what it lacks. `fallback`: it was found in another way than was asked for."""
    return pb.ReadReport(
        served_by=[*sorted(set(served_by)), *(["fallback"] if fallback else [])],
        shards=shards,
        degradation_level=pb.DEGRADATION_LEVEL_NORMAL,
    )
