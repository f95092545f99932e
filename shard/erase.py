"""Erasing a user: every row that holds anything of theirs, in bounded batches, until nothing is left.

What stays is one row for the request, known by a hash, so that its repetition has the same answer. Pages of the tables
and of the write-ahead log keep what was on them until they are reused (docs/erasure.md).
"""

import hashlib
from dataclasses import dataclass

import asyncpg

from common.postgres import Connection
from shard.ownership import NotOwnedError

# Rows that one transaction removes: some tens of milliseconds, so that it never holds locks for long.
_BATCH = 2000

# Ids named in an answer; the locations of the others are left to their time to live.
_MAX_IDS = 100_000

_HOLD = """
SELECT slot FROM owned_slots JOIN unnest($1::int[], $2::int[]) AS asked (first, last)
    ON slot BETWEEN asked.first AND asked.last
WHERE state = 'own' ORDER BY slot FOR SHARE OF owned_slots
"""
_REMOVE = """
WITH gone AS (
    DELETE FROM {table} WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM {table} WHERE user_id = $1 AND slot = ANY ($2::int[]) LIMIT $3
    ))
    RETURNING {returning}
)
SELECT * FROM gone
"""
# Without a list of rows: what somebody changed meanwhile is waited for, and is the user's still.
_REMOVE_REST = """
WITH gone AS (DELETE FROM {table} WHERE user_id = $1 AND slot = ANY ($2::int[]) RETURNING {returning})
SELECT * FROM gone
"""
_TABLES = (
    ("memories", "id, deleted_at IS NULL AS counts"),
    ("memory_versions", "id, true AS counts"),
    ("applied_requests", "NULL::uuid AS id, false AS counts"),
    ("request_claims", "NULL::uuid AS id, false AS counts"),
    ("claims", "id, false AS counts"),
)
_MEMORIES = 0
_BATCHES = tuple(_REMOVE.format(table=table, returning=returning) for table, returning in _TABLES)
_RESTS = tuple(_REMOVE_REST.format(table=table, returning=returning) for table, returning in _TABLES)
_RECORD = """
INSERT INTO erasures (slot, request_hash, memories, versions, done) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (slot, request_hash) DO UPDATE
    SET memories = erasures.memories + $3, versions = erasures.versions + $4, done = $5
RETURNING memories, versions
"""
_FIND_DONE = "SELECT memories, versions FROM erasures WHERE slot = $1 AND request_hash = $2 AND done"


@dataclass(frozen=True, slots=True)
class Erased:
    """How much went in all attempts with one request id, the ids that went in this one, whether it was over."""

    memories: int
    versions: int
    ids: frozenset[str]
    repeated: bool


async def erase(
    connection: Connection, ranges: tuple[list[int], list[int]], slot_count: int, user_id: str, request_id: str
) -> Erased:
    """Removes everything of a user in the slots of `ranges` (firsts, lasts), `slot_count` in all.

    Raises NotOwnedError when some of them are not this shard's.
    """
    eraser = _Eraser(connection, ranges, slot_count, user_id, request_id)
    finished = await eraser.finished()
    repeated = finished is not None
    while finished is None:
        removed = [await eraser.remove(number) for number in range(len(_TABLES))]
        # Whoever wrote meanwhile may have left more behind; a round that finds nothing is the end.
        if not any(removed):
            finished = await eraser.finish()
    return Erased(finished["memories"], finished["versions"], frozenset(eraser.ids), repeated)


class _Eraser:
    """One request to erase, a transaction at a time.

    Each is about one table: an erasure that held requests while it waited for memories could wait in a ring with a
    delete, which takes them the other way round.
    """

    def __init__(
        self,
        connection: Connection,
        ranges: tuple[list[int], list[int]],
        slot_count: int,
        user_id: str,
        request_id: str,
    ) -> None:
        self._connection = connection
        self._ranges = ranges
        self._slot_count = slot_count
        self._user_id = user_id
        self._request_hash = hashlib.sha256(f"{len(user_id)} {user_id} {request_id}".encode()).digest()
        self.ids: set[str] = set()

    async def finished(self) -> asyncpg.Record | None:
        """The totals of this request, if it came to its end before."""
        return await self._connection.fetchrow(_FIND_DONE, self._ranges[0][0], self._request_hash)

    async def remove(self, number: int) -> int:
        """Removes what there is in a table, or a batch of it; returns how much that was. Raises NotOwnedError."""
        async with self._connection.transaction():
            slots = await self._hold()
            rows = await self._connection.fetch(_BATCHES[number], self._user_id, slots, _BATCH)
            if len(rows) < _BATCH:
                rows += await self._connection.fetch(_RESTS[number], self._user_id, slots)
            counted = sum(row["counts"] for row in rows)
            if counted:
                memories, versions = (counted, 0) if number == _MEMORIES else (0, counted)
                await self._record(memories, versions, done=False)
        if number == _MEMORIES:
            self.ids.update(str(row["id"]) for row in rows[: _MAX_IDS - len(self.ids)])
        return len(rows)

    async def finish(self) -> asyncpg.Record:
        """Marks the request as carried out, and returns its totals."""
        async with self._connection.transaction():
            await self._hold()
            return await self._record(0, 0, done=True)

    async def _hold(self) -> list[int]:
        slots = [row["slot"] for row in await self._connection.fetch(_HOLD, *self._ranges)]
        if len(slots) != self._slot_count:
            raise NotOwnedError
        return slots

    async def _record(self, memories: int, versions: int, *, done: bool) -> asyncpg.Record:
        totals = await self._connection.fetchrow(
            _RECORD, self._ranges[0][0], self._request_hash, memories, versions, done
        )
        assert totals is not None
        return totals
