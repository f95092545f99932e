"""How far the primary's log was known to be: what a read can say of its freshness without asking for it. Pure.

A position that was seen before a read's snapshot was taken covers nearly all that is committed up to it: all but what
had its commit in the log already and was not visible yet, such as a commit that waits for standbys. But whoever made
that commit reads his token's position after it became visible, and so after the snapshot: his position is that one or a
later one (`shard.position`). So a read has all that tokens of *earlier* positions speak of.
"""

from memshard.internal.v1 import shard_pb2


class LogSeen:
    """The furthest position seen on the newest timeline."""

    def __init__(self) -> None:
        self._timeline = 0
        self._lsn = 0

    def observe(self, timeline: int, lsn: int) -> None:
        """The log of this timeline has been flushed up to here."""
        self._timeline, self._lsn = max((self._timeline, self._lsn), (timeline, lsn))

    def stamp(self, timeline: int) -> shard_pb2.ReadStamp | None:
        """What a read says of itself that begins now on the primary of this timeline; None when nothing is known."""
        if not 0 < timeline == self._timeline:
            return None
        return shard_pb2.ReadStamp(timeline=timeline, lsn=max(0, self._lsn - 1))
