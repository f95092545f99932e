"""What a read says of itself."""

from memshard.v1 import memory_pb2 as pb

ONE_SHARD = pb.ShardSummary(total=1, succeeded=1)


def report(shards: pb.ShardSummary, *, fallback: bool = False) -> pb.ReadReport:
    """Where an answer came from, and what it lacks. `fallback`: it was found in another way than was asked for."""
    return pb.ReadReport(
        served_by=["primary", "fallback"] if fallback else ["primary"],
        shards=shards,
        degradation_level=pb.DEGRADATION_LEVEL_NORMAL,
    )
