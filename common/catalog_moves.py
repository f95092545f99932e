"""Moves of slots in the catalog. Every change of a step is a compare-and-set on the move's version.

Whoever drives a move holds its lease, a session's advisory lock, on the connection that it makes these changes with:
two cannot drive one move, and who has lost the connection has lost the right to change anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import asyncpg

from common.catalog import CHANNEL, CatalogError, EpochConflictError, read_epoch
from common.moves import Move, OpenMove, Progress, Step
from common.postgres import Connection
from common.topology import GIVES, TAKES, SlotRange

# The first of the two keys of the advisory locks in catalog and shards. The second is the move's id.
LEASE_CLASS = 0x6D6F7665  # "move"

_COLUMNS = """move_id, first, last, source, target, step, version, attempts, source_timeline, target_timeline, rows,
              fenced_at, cutover_at, cutover_epoch, rollback_window_s, error"""
# Whatever the plan was made from, the source must have the slots now, and both shards a status by which they can go.
# A hand-over or a status that is just being recorded is waited for, by the lock on the epoch that it raises, and the
# epoch is another one then: what was seen of the rest counts no more.
_CREATE = f"""
WITH owned AS (
    SELECT sum(least(last, $2::int) - greatest(first, $1::int) + 1) AS slots
    FROM slot_ranges WHERE first <= $2::int AND last >= $1::int AND shard_id = $3::text
), willing AS (
    SELECT FROM shards AS giver, shards AS taker
    WHERE giver.shard_id = $3::text AND giver.status = ANY ($6::text[])
        AND taker.shard_id = $4::text AND taker.status = ANY ($7::text[])
), standing AS (
    SELECT epoch FROM topology WHERE epoch = (SELECT epoch FROM topology) FOR SHARE
)
INSERT INTO moves (first, last, source, target, step, rollback_window_s)
SELECT $1::int, $2::int, $3::text, $4::text, 'planned', $5::double precision FROM owned, willing, standing
WHERE owned.slots = $2::int - $1::int + 1
RETURNING {_COLUMNS}
"""  # noqa: S608  # A constant, here as below.
_OWNS = """
SELECT coalesce(sum(least(last, $2::int) - greatest(first, $1::int) + 1), 0) = $2::int - $1::int + 1
FROM slot_ranges WHERE first <= $2::int AND last >= $1::int AND shard_id = $3::text
"""
_STATUSES = "SELECT shard_id, status FROM shards WHERE shard_id = ANY ($1::text[])"
_TRIES = 5
_READ = f"SELECT {_COLUMNS} FROM moves ORDER BY move_id"  # noqa: S608
# Clocks differ, and who waits for the end of a window may be held up.
_LONG_OVERDUE_S = 60.0
_READ_OPEN = f"""
SELECT {_COLUMNS}, EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1 AND objid::bigint = move_id
        AND objsubid = 2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS is_driven,
    step = 'active' AND coalesce(cutover_at + make_interval(secs => rollback_window_s + $2) < now(), true)
        AS is_long_overdue
FROM moves WHERE step NOT IN ('done', 'rolled_back') ORDER BY move_id
"""  # noqa: S608
_COUNT_ENDED = "SELECT step, count(*) FROM moves WHERE step IN ('done', 'rolled_back') GROUP BY step"
_READ_ONE = f"SELECT {_COLUMNS} FROM moves WHERE move_id = $1"  # noqa: S608
_CHANGE = """
UPDATE moves SET step = $3, attempts = $4, source_timeline = $5, target_timeline = $6, rows = $7, fenced_at = $8,
    cutover_at = $9, cutover_epoch = $10, error = $11, rollback_window_s = $12, version = version + 1,
    changed_at = now()
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
_IS_SILENT = "SELECT changed_at < now() - make_interval(secs => $2) FROM moves WHERE move_id = $1"
# In the catalog and in shards alike. Not of who is at work there: a commit that waits for standbys must not be cut
# short, or it would be seen, and gone with the server. Who waits to send what the client does not take does nothing.
_END_HUNG = """
SELECT count(pg_terminate_backend(pid, $4)) FROM pg_locks JOIN pg_stat_activity AS holder USING (pid)
WHERE locktype = 'advisory' AND granted AND classid = $1 AND objid = $2 AND objsubid = 2
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (state <> 'active' OR holder.wait_event = 'ClientWrite')
    AND state_change < now() - make_interval(secs => $3)
"""
_END_TIMEOUT_MS = 5000
# What a hand-over needs is one statement, as each round trip is a part of the time in which nobody may write.
_READ_STANDING = """
SELECT epoch, (SELECT address FROM shards WHERE shard_id = $2) AS address,
       (SELECT primary_server FROM sync_sets WHERE shard_id = $1) AS giver,
       (SELECT primary_server FROM sync_sets WHERE shard_id = $2) AS taker,
       (SELECT array_agg(first ORDER BY first) FROM slot_ranges) AS firsts,
       (SELECT array_agg(last ORDER BY first) FROM slot_ranges) AS lasts,
       (SELECT array_agg(shard_id ORDER BY first) FROM slot_ranges) AS owners
FROM topology
"""
# All of it or nothing: every part is joined to `raised`, which has a row when move and epoch both are what they were.
# What is removed and what is made are different ranges, so that it does not matter which part comes first. The place of
# a cutover never goes back: another move between the two may have read a later one, and been recorded before.
_HAND_OVER = """
WITH held AS (
    SELECT move_id FROM moves WHERE move_id = $2 AND version = $3 FOR UPDATE
), raised AS (
    UPDATE topology SET epoch = epoch + 1 FROM held WHERE epoch = $1 RETURNING epoch
), removed AS (
    DELETE FROM slot_ranges USING raised WHERE first <> ALL ($6::int[])
), made AS (
    INSERT INTO slot_ranges AS known (first, last, shard_id)
    SELECT given.* FROM raised, unnest($6::int[], $7::int[], $8::text[]) AS given (first, last, shard_id)
    ON CONFLICT (first) DO UPDATE SET last = excluded.last, shard_id = excluded.shard_id
    WHERE (known.last, known.shard_id) IS DISTINCT FROM (excluded.last, excluded.shard_id)
), recorded AS (
    INSERT INTO cutovers AS known (source, target, timeline, lsn, epoch)
    SELECT $9::text, $10::text, $11::int, $12::bigint, epoch FROM raised
    ON CONFLICT (source, target) DO UPDATE SET epoch = excluded.epoch,
        timeline = CASE WHEN (known.timeline, known.lsn) > (excluded.timeline, excluded.lsn)
                        THEN known.timeline ELSE excluded.timeline END,
        lsn = CASE WHEN (known.timeline, known.lsn) > (excluded.timeline, excluded.lsn)
                   THEN known.lsn ELSE excluded.lsn END
), changed AS (
    UPDATE moves SET step = $4, error = '', cutover_at = $5, cutover_epoch = raised.epoch, version = version + 1,
        changed_at = now()
    FROM raised WHERE move_id = $2 AND version = $3
    RETURNING version
)
SELECT raised.epoch, changed.version, pg_notify($13, raised.epoch::text) FROM raised, changed
"""
_READ_PINS = "SELECT slot, shard_id FROM pins ORDER BY slot"
_PIN = "INSERT INTO pins (slot, shard_id) VALUES ($1, $2) ON CONFLICT (slot) DO UPDATE SET shard_id = $2"
_UNPIN = "DELETE FROM pins WHERE slot = $1"


class MoveConflictError(CatalogError):
    """The move is no longer at the step that the change at hand was planned for; nothing was done."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a hand-over is planned against, all of one moment: it is done only if the epoch is still this one."""

    epoch: int
    address: str
    """Where the taker is reached."""
    primaries: Mapping[str, str]
    """The names of the servers that are primary of giver and taker, as far as they are recorded."""
    ranges: tuple[SlotRange, ...]


async def create_move(
    connection: Connection, first: int, last: int, source: str, target: str, *, rollback_window_s: float = 30.0
) -> Move:
    """Records a move that is to be, and for how long it can be brought back once the slots have gone over.

    Raises MoveConflictError when another one has some of the slots, the source has not all of them (any more), or by
    their status it gives none, or the target takes none.
    """
    for _ in range(_TRIES):
        try:
            row = await connection.fetchrow(
                _CREATE, first, last, source, target, rollback_window_s, sorted(GIVES), sorted(TAKES)
            )
        except asyncpg.ExclusionViolationError as error:
            raise MoveConflictError(
                f"slots {first} to {last} are being moved already; another mover is at work, wait for it"
            ) from error
        if row is not None:
            return _move(dict(row))
        if not await connection.fetchval(_OWNS, first, last, source):
            raise MoveConflictError(
                f"slots {first} to {last} do not all belong to {source} any more; another mover is at work, wait for it"
            )
        status = {row["shard_id"]: row["status"] for row in await connection.fetch(_STATUSES, [source, target])}
        if status.get(source) not in GIVES or status.get(target) not in TAKES:
            told = " to ".join(f"{shard_id} ({status.get(shard_id, 'removed')})" for shard_id in (source, target))
            raise MoveConflictError(f"slots {first} to {last} cannot go from {told} any more; plan anew")
    raise CatalogError("the catalog keeps changing")


async def read_moves(connection: Connection) -> list[Move]:
    """All moves ever, oldest first."""
    return [_move(dict(row)) for row in await connection.fetch(_READ)]


async def read_progress(connection: Connection) -> Progress:
    """The moves that are not over, each with whether somebody drives it or should, and how many have ended."""
    rows = [dict(row) for row in await connection.fetch(_READ_OPEN, LEASE_CLASS, _LONG_OVERDUE_S)]
    ended = await connection.fetch(_COUNT_ENDED)
    return Progress(
        tuple(
            OpenMove(is_driven=row.pop("is_driven"), is_long_overdue=row.pop("is_long_overdue"), move=_move(row))
            for row in rows
        ),
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
        changed.rollback_window_s,
    )
    if version is None:
        raise MoveConflictError(f"move {planned.move_id} is no longer {planned.step}")
    return replace(changed, version=version)


async def read_standing(connection: Connection, giver: str, taker: str) -> Standing:
    """What a hand-over from one shard to another is to be planned against. Raises CatalogError."""
    row = await connection.fetchrow(_READ_STANDING, giver, taker)
    if row is None or row["address"] is None:
        raise CatalogError(f"there is no shard {taker!r}")
    ranges = zip(row["firsts"], row["lasts"], row["owners"], strict=True)
    primaries = {shard: name for shard, name in ((giver, row["giver"]), (taker, row["taker"])) if name is not None}
    return Standing(row["epoch"], row["address"], primaries, tuple(SlotRange(*known) for known in ranges))


async def hand_over(
    connection: Connection,
    standing: Standing,
    planned: Move,
    changed: Move,
    giver: str,
    taker: str,
    at: tuple[int, int],
) -> Move:
    """The point of no return: in one transaction the taker has the slots, the epoch is raised, and the move is at the
    step and has the time of `changed`.

    `at` is the place in the taker's log, timeline and position, at which it has all of them. Raises EpochConflictError,
    MoveConflictError, CatalogError: nothing has changed then.
    """
    given = handed_over(standing.ranges, planned.first, planned.last, giver, taker)
    row = await connection.fetchrow(
        _HAND_OVER,
        standing.epoch,
        planned.move_id,
        planned.version,
        changed.step.value,
        changed.cutover_at,
        [owned.first for owned in given],
        [owned.last for owned in given],
        [owned.shard_id for owned in given],
        giver,
        taker,
        *at,
        CHANNEL,
    )
    if row is not None:
        return replace(changed, error="", version=row["version"], cutover_epoch=row["epoch"])
    if await read_epoch(connection) != standing.epoch:
        raise EpochConflictError(f"the topology is no longer at epoch {standing.epoch}")
    raise MoveConflictError(f"move {planned.move_id} is no longer {planned.step}")


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


async def is_unattended(connection: Connection, move: Move, hung_after_s: float) -> bool:
    """Whether nobody sees to it that a move's fence ends: nobody drives it, or who does hangs, and so has recorded
    nothing for as long since it was made.
    """
    if not await is_leased(connection, move.move_id):
        return True
    return move.fenced_at is not None and bool(await connection.fetchval(_IS_SILENT, move.move_id, hung_after_s))


async def end_hung(connection: Connection, move_id: int, hung_after_s: float) -> None:
    """Ends the session that has a move's lock in this database, the catalog's or a shard's, if it is of our own role
    and has done nothing for so long. To be asked for by who has the right to the lock.
    """
    await connection.execute(_END_HUNG, LEASE_CLASS, move_id, hung_after_s, _END_TIMEOUT_MS)


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
