"""Erasing a user: every row that holds anything of theirs, in bounded batches, until nothing is left.

What stays is a row or a few for the request, known by a hash, so that its repetition has the same answer; and, until
the routers have said that no cache knows them any more, the ids of the memories that went. Pages of the tables and of
the write-ahead log keep what was on them until they are reused (docs/erasure.md).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from shard.ownership import NotOwnedError

# Rows that one transaction removes: some tens of milliseconds, so that it never holds locks for long.
_BATCH = 2000

# Ids named in one answer: 0.8 MB.
_MAX_IDS = 20_000

# The first of the two keys of the advisory locks that erasures take. Any number will do that nothing else here takes.
_LOCK_CLASS = 1

# Erasures of one user take turns: they would delete the same rows in different orders, and wait in a ring.
_LOCK_USER = "SELECT pg_advisory_xact_lock($1, $2)"
_HOLD = """
SELECT slot FROM owned_slots JOIN unnest($1::int[], $2::int[]) AS asked (first, last)
    ON slot BETWEEN asked.first AND asked.last
WHERE state = 'own' ORDER BY slot FOR SHARE OF owned_slots
"""
# Most of the versions, so that few are left to go in one transaction with their memories. Whatever is locked waits for
# that: who holds a version may want another, and two that take several in different orders would wait in a ring.
_REMOVE_SOME_VERSIONS = """
DELETE FROM memory_versions WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM memory_versions WHERE user_id = $1 AND slot = ANY ($2::int[]) LIMIT $3 FOR UPDATE SKIP LOCKED
))
RETURNING 1
"""
_SOME = "ctid = ANY (ARRAY(SELECT ctid FROM {table} WHERE user_id = $1 AND slot = ANY ($2::int[]) LIMIT $3))"
# Without a list of rows: what somebody changed meanwhile is waited for, and is the user's still.
_REST = "user_id = $1 AND slot = ANY ($2::int[]) AND $3 > 0"
_REMOVE_MEMORIES = """
WITH gone AS (
    DELETE FROM memories WHERE {which} RETURNING slot, id, deleted_at IS NULL AS live
), noted AS (
    INSERT INTO erased_ids (user_hash, slot, id) SELECT $4, slot, id FROM gone
    ON CONFLICT (user_hash, slot, id) DO UPDATE SET erased_at = now()
)
SELECT slot, id, live FROM gone
"""
# A statement of its own: it sees the versions that updates kept which the one before had to wait for.
_REMOVE_THEIR_VERSIONS = """
DELETE FROM memory_versions USING unnest($2::int[], $3::uuid[]) AS memory (slot, id)
WHERE memory_versions.slot = memory.slot AND user_id = $1 AND memory_versions.id = memory.id
RETURNING 1
"""
_REMOVE = "DELETE FROM {table} WHERE {which} RETURNING 1"
# Versions among them: those that no memory has any more.
_OTHER_TABLES = ("memory_versions", "applied_requests", "request_claims", "claims")
_RECORD = """
INSERT INTO erasures (slot, request_hash, memories, versions, done) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (slot, request_hash) DO UPDATE
    SET memories = erasures.memories + $3, versions = erasures.versions + $4, done = $5
"""
_IS_DONE = "SELECT EXISTS (SELECT FROM erasures WHERE slot = $1 AND request_hash = $2 AND done)"
# Of all slots: what was counted in one of another shard came with it.
_TOTALS = """
SELECT coalesce(sum(memories), 0)::bigint AS memories, coalesce(sum(versions), 0)::bigint AS versions
FROM erasures JOIN unnest($1::int[], $2::int[]) AS asked (first, last) ON slot BETWEEN asked.first AND asked.last
WHERE request_hash = $3
"""
_FIND_IDS = """
SELECT id FROM erased_ids JOIN unnest($2::int[], $3::int[]) AS asked (first, last)
    ON slot BETWEEN asked.first AND asked.last
WHERE user_hash = $1 ORDER BY slot, id LIMIT $4
"""
_FORGET_IDS = "DELETE FROM erased_ids WHERE user_hash = $1 AND slot = ANY ($2::int[]) AND id = ANY ($3::uuid[])"


@dataclass(frozen=True, slots=True)
class Erased:
    """How much went in all attempts with one request id, ids of the user's that a cache may still know, and whether
    nothing had to be written for it any more."""

    memories: int
    versions: int
    ids: frozenset[str]
    repeated: bool


async def erase(
    connection: Connection,
    ranges: tuple[list[int], list[int]],
    slot_count: int,
    user_id: str,
    request_id: str,
    *,
    part: shard_pb2.ErasePart.ValueType = shard_pb2.ERASE_PART_UNSPECIFIED,
    forgotten: Sequence[str] = (),
) -> Erased:
    """Removes everything of a user in the slots of `ranges` (firsts, lasts), `slot_count` in all; with SETTLE nothing.

    With REMOVE it is not for this shard to say when the request is over (`shard.erasures`): it may have slots by then
    that another had. `forgotten` are ids that were told before and that no cache knows any more. Whatever is not among
    them is told again, in this answer or in one of those that follow, whichever request of the user's it went with.
    Raises NotOwnedError when some of the slots are not this shard's.
    """
    eraser = _Eraser(connection, ranges, slot_count, user_id, request_id)
    if forgotten:
        await eraser.forget(forgotten)
    # With REMOVE as well: a router that knows nothing of parts may have been told that it is over.
    is_over = part == shard_pb2.ERASE_PART_SETTLE or await eraser.is_finished()
    repeated = True
    while not is_over:
        removed = await eraser.remove_some_versions() + await eraser.remove_memories()
        removed += sum([await eraser.remove(table) for table in _OTHER_TABLES])
        # Whoever wrote meanwhile may have left more behind; a round that finds nothing is the end.
        is_over = not removed
        if is_over and part != shard_pb2.ERASE_PART_REMOVE:
            await eraser.finish()
        repeated = repeated and is_over and part == shard_pb2.ERASE_PART_REMOVE
    totals = await eraser.totals()
    return Erased(totals["memories"], totals["versions"], await eraser.known_ids(), repeated)


class _Eraser:
    """One request to erase, a transaction at a time.

    Each is about one table, or about memories and then their versions, as with everybody who changes a memory. An
    erasure that held requests while it waited for memories could wait in a ring with a delete, which takes them the
    other way round.
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
        self._user_hash = hashlib.sha256(user_id.encode()).digest()
        self._request_hash = hashlib.sha256(f"{len(user_id)} {user_id} {request_id}".encode()).digest()
        self._ids: set[str] = set()

    async def is_finished(self) -> bool:
        """Whether this request came to its end before."""
        finished: bool = await self._connection.fetchval(_IS_DONE, self._ranges[0][0], self._request_hash)
        return finished

    async def remove_some_versions(self) -> int:
        """Removes versions that nobody holds, batch by batch; returns how many. Raises NotOwnedError."""
        removed = 0
        while True:
            async with self._connection.transaction():
                slots = await self._hold()
                rows = await self._connection.fetch(_REMOVE_SOME_VERSIONS, self._user_id, slots, _BATCH)
                await self._count(0, len(rows))
            removed += len(rows)
            if len(rows) < _BATCH:
                return removed

    async def remove_memories(self) -> int:
        """Removes all memories or a batch of them, with their versions; returns how many. Raises NotOwnedError."""
        async with self._connection.transaction():
            slots = await self._hold()
            which = _SOME.format(table="memories")
            rows = await self._remove_memories(which, slots)
            if len(rows) < _BATCH:
                rows += await self._remove_memories(_REST, slots)
            of_slots, ids = [row["slot"] for row in rows], [row["id"] for row in rows]
            versions = await self._connection.fetch(_REMOVE_THEIR_VERSIONS, self._user_id, of_slots, ids)
            await self._count(sum(row["live"] for row in rows), len(versions))
        self._ids.update(str(id) for id in ids[: _MAX_IDS - len(self._ids)])
        return len(rows)

    async def remove(self, table: str) -> int:
        """Removes what there is in a table, or a batch of it; returns how much that was. Raises NotOwnedError."""
        async with self._connection.transaction():
            slots = await self._hold()
            some = _REMOVE.format(table=table, which=_SOME.format(table=table))
            rows = await self._connection.fetch(some, self._user_id, slots, _BATCH)
            if len(rows) < _BATCH:
                rest = _REMOVE.format(table=table, which=_REST)
                rows += await self._connection.fetch(rest, self._user_id, slots, _BATCH)
            await self._count(0, len(rows) if table == "memory_versions" else 0)
        return len(rows)

    async def finish(self) -> None:
        """Marks the request as carried out. Raises NotOwnedError."""
        async with self._connection.transaction():
            await self._hold()
            await self._record(0, 0, done=True)

    async def totals(self) -> asyncpg.Record:
        """What went from these slots in all attempts. Raises NotOwnedError."""
        async with self._connection.transaction():
            await self._hold()
            totals = await self._connection.fetchrow(_TOTALS, *self._ranges, self._request_hash)
        assert totals is not None
        return totals

    async def forget(self, ids: Sequence[str]) -> None:
        """Drops ids that no cache knows any more. Raises NotOwnedError."""
        async with self._connection.transaction():
            slots = await self._hold()
            await self._connection.execute(_FORGET_IDS, self._user_hash, slots, list(ids))

    async def known_ids(self) -> frozenset[str]:
        """Ids that a cache may still know; those that went with this very attempt first.

        Another attempt may have said of one of them that it is forgotten: of what was there before this one.
        """
        rows = await self._connection.fetch(_FIND_IDS, self._user_hash, *self._ranges, _MAX_IDS - len(self._ids))
        return frozenset(self._ids.union(str(row["id"]) for row in rows))

    async def _remove_memories(self, which: str, slots: list[int]) -> list[asyncpg.Record]:
        statement = _REMOVE_MEMORIES.format(which=which)
        return await self._connection.fetch(statement, self._user_id, slots, _BATCH, self._user_hash)

    async def _hold(self) -> list[int]:
        turn = int.from_bytes(self._user_hash[:4], "big", signed=True)
        await self._connection.execute(_LOCK_USER, _LOCK_CLASS, turn)
        slots = [row["slot"] for row in await self._connection.fetch(_HOLD, *self._ranges)]
        if len(slots) != self._slot_count:
            raise NotOwnedError
        return slots

    async def _count(self, memories: int, versions: int) -> None:
        if memories or versions:
            await self._record(memories, versions, done=False)

    async def _record(self, memories: int, versions: int, *, done: bool) -> None:
        await self._connection.execute(_RECORD, self._ranges[0][0], self._request_hash, memories, versions, done)
