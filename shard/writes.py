"""A write's way: a connection to the primary, a commit that nobody cancels, and a receipt that is true."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

from common.deadline import Deadline
from common.postgres import Connection
from common.telemetry.registry import WRITES
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard.commits import Commits
from shard.database import Database
from shard.durability import Durability
from shard.log_seen import LogSeen
from shard.position import read_position
from shard.primary import timeline_of

T = TypeVar("T")

_ACKNOWLEDGED = {
    durability: WRITES.labels(pb.Durability.Name(durability).removeprefix("DURABILITY_").lower())
    for durability in (pb.DURABILITY_LOCAL, pb.DURABILITY_QUORUM)
}

# What a write answers, and whether that was there before it: then it has committed nothing of its own.
Write: TypeAlias = Callable[[Connection], Awaitable[tuple[T, bool]]]

# A commit with a place in the log and no effect. It waits for the standbys like any other, and with it for all that was
# committed before: what a repeated write found may be there from before a crash, and on no standby yet.
_BARRIER = "SELECT pg_logical_emit_message(true, 'memshard', '')"


def _one(_: object) -> int:
    return 1


class Writes:
    """Runs the shard's writes."""

    def __init__(self, database: Database, commits: Commits, durability: Durability, seen: LogSeen) -> None:
        self._database = database
        self._commits = commits
        self._durability = durability
        self.seen = seen
        """Hears how far into the log they have come."""

    async def run(
        self, write: Write[T], deadline: Deadline, acknowledges: Callable[[T], int] = _one
    ) -> tuple[T, shard_pb2.Commit]:
        """What `write` answers, and the receipt. When the caller leaves, the write goes on without it.

        `acknowledges` says how many requests' writes an answer is of.

        Raises Unavailable, OutcomeUnknown, and what `write` does.
        """
        acquired = await self._database.to_write(deadline)

        async def commit() -> tuple[T, shard_pb2.Commit]:
            begun = self._durability.begin()
            async with acquired.entered() as connection:
                self._durability.require_primary(timeline_of(connection))
                before = await read_position(connection) if self._durability.is_external else None
                answer, repeated = await write(connection)
                if repeated:
                    await connection.execute(_BARRIER)
                here = await read_position(connection)
            self.seen.observe(here.timeline, here.lsn)
            durability = self._durability.of_commit(begun, here, before)
            _ACKNOWLEDGED[durability].inc(acknowledges(answer))
            return answer, shard_pb2.Commit(timeline=here.timeline, lsn=here.lsn, durability=durability)

        # From here on the caller may leave, and the write goes on. Nothing is awaited between the two.
        return await self._commits.run(commit())
