"""Moves of slots in the catalog. Every change of a step is a compare-and-set on the move's version.

Whoever drives a move holds its lease, a session's advisory lock, on the connection that it makes these changes with:
two cannot drive one move, and who has lost the connection has lost the right to change anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import asyncpg

from common.catalog import CatalogError, raise_epoch
from common.moves import Move, OpenMove, Progress, Step
from common.postgres import Connection
from common.topology import SlotRange

# The first of the two keys of the advisory locks in catalog and shards. The second is the move's id.
LEASE_CLASS = 0x6D6F7665  # "move"

_COLUMNS = """move_id, first, last, source, target, step, version, attempts, source_timeline, target_timeline, rows,
              fenced_at, cutover_at, cutover_epoch, error"""
_CREATE = f"""
INSERT INTO moves (first, last, source, target, step) VALUES ($1, $2, $3, $4, 'planned') RETURNING {_COLUMNS}
"""  # noqa: S608  # A constant, here as below.
_READ = f"SELECT {_COLUMNS} FROM moves ORDER BY move_id"  # noqa: S608
_READ_OPEN = f"""
SELECT {_COLUMNS}, EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1 AND objid::bigint = move_id
        AND objsubid = 2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS is_driven
FROM moves WHERE step NOT IN ('done', 'rolled_back') ORDER BY move_id
"""  # noqa: S608
_COUNT_ENDED = "SELECT step, count(*) FROM moves WHERE step IN ('done', 'rolled_back') GROUP BY step"
_READ_ONE = f"SELECT {_COLUMNS} FROM moves WHERE move_id = $1"  # noqa: S608
_CHANGE = """
UPDATE moves SET step = $3, attempts = $4, source_timeline = $5, target_timeline = $6, rows = $7, fenced_at = $8,
    cutover_at = $9, cutover_epoch = $10, error = $11, version = version + 1, changed_at = now()
WHERE move_id = $1 AND version = $2
RETURNING version
"""
_LEASE = "SELECT pg_try_advisory_lock($1, $2)"
_RELEASE = "SELECT pg_advisory_unlock($1, $2)"
_IS_LEASED = """
SELECT EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1 AND objid = $2 AND objsubid = 2
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""
_READ_RANGES = "SELECT first, last, shard_id FROM slot_ranges ORDER BY first"
_DROP_RANGES = "DELETE FROM slot_ranges"
_CREATE_RANGE = "INSERT INTO slot_ranges (first, last, shard_id) VALUES ($1, $2, $3)"
_RECORD_CUTOVER = """
INSERT INTO cutovers (source, target, timeline, lsn, epoch) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (source, target) DO UPDATE SET timeline = $3, lsn = $4, epoch = $5
"""
_READ_PINS = "SELECT slot, shard_id FROM pins ORDER BY slot"
_PIN = "INSERT INTO pins (slot, shard_id) VALUES ($1, $2) ON CONFLICT (slot) DO UPDATE SET shard_id = $2"
_UNPIN = "DELETE FROM pins WHERE slot = $1"


class MoveConflictError(CatalogError):
    """The move is no longer at the step that the change at hand was planned for; nothing was done."""


async def create_move(connection: Connection, first: int, last: int, source: str, target: str) -> Move:
    """Records a move that is to be. Raises MoveConflictError when another one has some of the slots."""
    try:
        row = await connection.fetchrow(_CREATE, first, last, source, target)
    except asyncpg.ExclusionViolationError as error:
        raise MoveConflictError(f"slots {first} to {last} are being moved already") from error
    assert row is not None
    return _move(dict(row))


async def read_moves(connection: Connection) -> list[Move]:
    """All moves ever, oldest first."""
    return [_move(dict(row)) for row in await connection.fetch(_READ)]


async def read_progress(connection: Connection) -> Progress:
    """The moves that are not over, each with whether somebody drives it, and how many have ended."""
    rows = [dict(row) for row in await connection.fetch(_READ_OPEN, LEASE_CLASS)]
    ended = await connection.fetch(_COUNT_ENDED)
    return Progress(
        tuple(OpenMove(is_driven=row.pop("is_driven"), move=_move(row)) for row in rows),
        {Step(row["step"]): row["count"] for row in ended},
    )


async def read_move(connection: Connection, move_id: int) -> Move:
    """One move. Raises CatalogError when there is none with this id."""
    row = await connection.fetchrow(_READ_ONE, move_id)
    if row is None:
        raise CatalogError(f"there is no move {move_id}")
    return _move(dict(row))


async def change_move(connection: Connection, planned: Move, changed: Move) -> Move:
    """Makes `changed` of the move, if it is still what it was when `planned` was read; returns it.

    Raises MoveConflictError when it is not.
    """
    version = await connection.fetchval(
        _CHANGE,
        planned.move_id,
        planned.version,
        changed.step.value,
        changed.attempts,
        changed.source_timeline,
        changed.target_timeline,
        changed.rows,
        changed.fenced_at,
        changed.cutover_at,
        changed.cutover_epoch,
        changed.error,
    )
    if version is None:
        raise MoveConflictError(f"move {planned.move_id} is no longer {planned.step}")
    return replace(changed, version=version)


async def hand_over(
    connection: Connection, epoch: int, planned: Move, changed: Move, *, giver: str, taker: str, timeline: int, lsn: int
) -> Move:
    """The point of no return: in one transaction the taker has the slots, the epoch is raised, the move is `changed`.

    `timeline` and `lsn` are the place in the taker's log at which it has all of them. Raises EpochConflictError,
    MoveConflictError, CatalogError: nothing has changed then.
    """
    async with connection.transaction():
        raised = await raise_epoch(connection, epoch)
        ranges = [SlotRange(row["first"], row["last"], row["shard_id"]) for row in await connection.fetch(_READ_RANGES)]
        given = handed_over(ranges, planned.first, planned.last, giver, taker)
        await connection.execute(_DROP_RANGES)
        await connection.executemany(_CREATE_RANGE, [(r.first, r.last, r.shard_id) for r in given])
        await connection.execute(_RECORD_CUTOVER, giver, taker, timeline, lsn, raised)
        return await change_move(connection, planned, replace(changed, cutover_epoch=raised))


def handed_over(ranges: Sequence[SlotRange], first: int, last: int, giver: str, taker: str) -> list[SlotRange]:
    """The ranges after slots `first` to `last` went from `giver` to `taker`: the fewest that say it.

    Raises CatalogError when some of them are not the giver's.
    """
    pieces: list[SlotRange] = []
    for owned in ranges:
        overlap = max(owned.first, first), min(owned.last, last)
        if overlap[0] > overlap[1]:
            pieces.append(owned)
            continue
        if owned.shard_id != giver:
            raise CatalogError(f"slots {overlap[0]} to {overlap[1]} belong to {owned.shard_id}, not to {giver}")
        if owned.first < overlap[0]:
            pieces.append(SlotRange(owned.first, overlap[0] - 1, giver))
        pieces.append(SlotRange(*overlap, taker))
        if overlap[1] < owned.last:
            pieces.append(SlotRange(overlap[1] + 1, owned.last, giver))
    merged: list[SlotRange] = []
    for piece in pieces:
        if merged and merged[-1].shard_id == piece.shard_id and merged[-1].last + 1 == piece.first:
            merged[-1] = SlotRange(merged[-1].first, piece.last, piece.shard_id)
        else:
            merged.append(piece)
    return merged


async def take_lease(connection: Connection, move_id: int) -> bool:
    """Whether this session has the move to itself from now on, until it ends or releases it."""
    taken: bool = await connection.fetchval(_LEASE, LEASE_CLASS, move_id)
    return taken


async def release_lease(connection: Connection, move_id: int) -> None:
    """Lets others have the move."""
    await connection.execute(_RELEASE, LEASE_CLASS, move_id)


async def is_leased(connection: Connection, move_id: int) -> bool:
    """Whether somebody drives a move."""
    leased: bool = await connection.fetchval(_IS_LEASED, LEASE_CLASS, move_id)
    return leased


async def read_pins(connection: Connection) -> dict[int, str]:
    """Slots that are to stay on a shard, whatever the weights say."""
    return {row["slot"]: row["shard_id"] for row in await connection.fetch(_READ_PINS)}


async def pin(connection: Connection, slot: int, shard_id: str | None) -> None:
    """Pins a slot to a shard, or with None to none. Raises CatalogError when there is no such shard."""
    if shard_id is None:
        await connection.execute(_UNPIN, slot)
        return
    try:
        await connection.execute(_PIN, slot, shard_id)
    except asyncpg.ForeignKeyViolationError as error:
        raise CatalogError(f"there is no shard {shard_id!r}") from error


def _move(row: Mapping[str, Any]) -> Move:
    return Move(**{**row, "step": Step(row["step"])})
