"""How fresh something remembered is, and whether that is fresh enough for a read. Pure.

A stamp says of an answer what a server said of itself when it gave it (`ReadStamp` on the wire): it has all that
tokens up to a position speak of, and lacks nothing that was committed before the moment `fresh_at`. Time makes it older
and nothing else: whatever was written since has a later position.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from common.topology import Cutover, Topology
from memshard.internal.v1 import shard_pb2
from router.consistency import Consistency, Position


@dataclass(frozen=True, slots=True)
class Stamp:
    """Of which shard something is, and how fresh."""

    shard_id: str
    position: Position
    fresh_at: float
    """On this process's monotonic clock, in seconds."""

    @classmethod
    def of_answer(cls, shard_id: str, said: shard_pb2.ReadStamp, asked_at: float) -> "Stamp":
        """What a shard's server said in an answer to what it was asked at that time, or later."""
        return cls(shard_id, Position(said.timeline, said.lsn), asked_at - said.age_ms / 1000)

    def satisfies(self, consistency: Consistency, cutovers: Iterable[Cutover], now: float) -> bool:
        """Whether a read that asks for this may be answered with it, of a shard that has the slot still.

        Never a strong one: that is for the server that takes the writes.
        """
        if consistency.strong:
            return False
        wanted = consistency.under(cutovers).of(self.shard_id)
        if wanted.position is not None and self.position < wanted.position:
            return False
        return not wanted.max_staleness_ms or (now - self.fresh_at) * 1000 <= wanted.max_staleness_ms


class Timelines:
    """The newest timeline of each shard that a router has heard of: one for all that it remembers.

    What is of an older one may have been lost with a primary that acknowledged it alone. So it is told whatever says a
    timeline: answers, commits, tokens, and what servers say of themselves when they are looked at.
    """

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}

    def observe(self, shard_id: str, timeline: int) -> None:
        """A shard has come this far."""
        if timeline > self._newest.get(shard_id, 0):
            self._newest[shard_id] = timeline

    def holds(self, stamp: Stamp, slot: int, topology: Topology) -> bool:
        """Whether what has this stamp is of the shard that has the slot now, and of its newest timeline.

        Of a shard that has passed the slot on nothing is taken any more: its positions say nothing of what the new
        owner has been given since.
        """
        if topology.owner(slot).shard_id != stamp.shard_id:
            return False
        return stamp.position.timeline >= self._newest.get(stamp.shard_id, 0)
