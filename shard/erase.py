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
    ("claims", "id, false AS counts"),
)
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
    """How much went in all attempts with one request id, and the ids that went in this one."""

    memories: int
    versions: int
    ids: frozenset[str]


async def erase(
    connection: Connection, ranges: tuple[list[int], list[int]], slot_count: int, user_id: str, request_id: str
) -> Erased:
    """Removes everything of a user in the slots of `ranges` (firsts, lasts), `slot_count` in all.

    Raises NotOwnedError when some of them are not this shard's.
    """
    ids: set[str] = set()
    request_hash = hashlib.sha256(f"{len(user_id)} {user_id} {request_id}".encode()).digest()
    while True:
        async with connection.transaction():
            slots = [row["slot"] for row in await connection.fetch(_HOLD, *ranges)]
            if len(slots) != slot_count:
                raise NotOwnedError
            finished = await connection.fetchrow(_FIND_DONE, slots[0], request_hash)
            if finished is not None:
                return Erased(finished["memories"], finished["versions"], frozenset(ids))
            removed = [await connection.fetch(statement, user_id, slots, _BATCH) for statement in _BATCHES]
            done = False
            if all(len(rows) < _BATCH for rows in removed):
                rest = [await connection.fetch(statement, user_id, slots) for statement in _RESTS]
                # Whoever wrote meanwhile may have left more behind; an empty round is the end.
                done = not any(rest) and not any(removed)
                removed = [[*first, *second] for first, second in zip(removed, rest, strict=True)]
            memories, versions = (_count(rows) for rows in removed[:2])
            totals = await connection.fetchrow(_RECORD, slots[0], request_hash, memories, versions, done)
        ids.update(str(row["id"]) for row in removed[0][:_MAX_IDS])
        if done:
            assert totals is not None
            return Erased(totals["memories"], totals["versions"], frozenset(list(ids)[:_MAX_IDS]))


def _count(rows: list[asyncpg.Record]) -> int:
    return sum(row["counts"] for row in rows)
