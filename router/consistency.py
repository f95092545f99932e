"""How fresh a read must be: what its options and tokens ask of the servers. Pure.

| level | who may answer |
|---|---|
| STRONG, or none given | the primary |
| SESSION | any server that has all that the tokens say |
| BOUNDED_STALENESS | any server that lacks nothing older than `max_staleness` |
| EVENTUAL | any server; tokens and `max_staleness` say nothing here |

Where SESSION is given a `max_staleness`, or BOUNDED_STALENESS tokens, both hold: what is asked for is never ignored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from common.topology import Cutover
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb

# A replica that is half a minute behind does not serve (`max_lag_s`), whatever the bound: a longer one than this means
# the same, and need not travel.
_LONGEST_STALENESS_MS = 7 * 86_400_000


class Position(NamedTuple):
    """A place in one shard's write-ahead log. Whatever a timeline acknowledged, every later one has."""

    timeline: int
    lsn: int


ConsistencyKey: TypeAlias = tuple[bool, tuple[tuple[str, Position], ...], int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a read asks of the server of one shard that answers it."""

    position: Position | None = None
    """It has all that was committed up to here; None: no matter."""
    max_staleness_ms: int = 0
    """It lacks nothing that was committed longer ago than this; 0: no matter."""

    def freshness(self, shard_id: str, wait_ms: int) -> shard_pb2.Freshness:
        """The same for the wire; who is behind may wait `wait_ms` to catch up."""
        position = None
        if self.position is not None:
            position = shard_pb2.ShardPosition(
                shard_id=shard_id, timeline=self.position.timeline, lsn=self.position.lsn
            )
        return shard_pb2.Freshness(position=position, max_staleness_ms=self.max_staleness_ms, wait_ms=wait_ms)


@dataclass(frozen=True, slots=True)
class Consistency:
    """What a read asks of every shard that it touches."""

    strong: bool
    positions: Mapping[str, Position] = field(default_factory=dict)
    """By shard. Of a shard that is not in it, nothing is asked."""
    max_staleness_ms: int = 0

    @property
    def key(self) -> "ConsistencyKey":
        """The same for reads that ask the same."""
        return self.strong, tuple(sorted(self.positions.items())), self.max_staleness_ms

    def under(self, cutovers: Iterable[Cutover]) -> "Consistency":
        """The same once slots have moved: of a shard that got some, its place in the log at the cutover stands in for
        any position on the shard that had them. Of one that passed them on, for all before it.
        """
        if not self.positions:
            return self
        positions, pending = dict(self.positions), list(cutovers)
        while reached := [c for c in pending if c.source in positions]:
            pending = [c for c in pending if c.source not in positions]
            for cutover in reached:
                here = Position(cutover.timeline, cutover.lsn)
                positions[cutover.target] = latest(positions, cutover.target, here)
        return replace(self, positions=positions)

    def of(self, shard_id: str) -> Wanted:
        """What it asks of one shard."""
        return Wanted(self.positions.get(shard_id), self.max_staleness_ms)


STRONG = Consistency(strong=True)
EVENTUAL = Consistency(strong=False)


def consistency(options: pb.ReadOptions, positions: Mapping[str, Position]) -> Consistency:
    """What `options`, checked already, ask for; `positions` are what their tokens say."""
    if options.level in (pb.READ_LEVEL_UNSPECIFIED, pb.READ_LEVEL_STRONG):
        return STRONG
    if options.level == pb.READ_LEVEL_EVENTUAL:
        return EVENTUAL
    # Rounded up to a whole millisecond: 0 would be no bound at all.
    staleness_ms = min(-(-options.max_staleness.ToNanoseconds() // 1_000_000), _LONGEST_STALENESS_MS)
    return Consistency(strong=False, positions=positions, max_staleness_ms=staleness_ms)


def latest(positions: Mapping[str, Position], shard_id: str, position: Position) -> Position:
    """The later of what `positions` has of a shard, and `position`."""
    return max(positions.get(shard_id, position), position)
