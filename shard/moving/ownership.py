"""Who has the slots, in the shards' own databases: fencing them, taking a fence away, handing them over.

A fence is committed, and like every commit waits for the standbys: it outlives a failover.
"""

from dataclasses import dataclass

import asyncpg

from shard.moving.side import Side
from shard.moving.tables import MARKS
from shard.position import Position, read_position

# Writers hold the slots that they write to, many at a time, and do not queue behind whoever wants to change one: with
# enough of them there would never be a moment without. A lock on the table has a queue.
_LOCK = "LOCK TABLE owned_slots IN EXCLUSIVE MODE"
_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', $1, true)"
_FENCE = """
WITH fenced AS (
    UPDATE owned_slots SET state = 'fenced' WHERE slot BETWEEN $1 AND $2 AND state = 'own' RETURNING 1
)
SELECT count(*) FROM fenced
"""
_SET_MARK = f"""
INSERT INTO {MARKS} (slot, move_id, way, mark) VALUES ($1, $2, $3, $4)
ON CONFLICT (slot, move_id, way) DO UPDATE SET mark = excluded.mark
"""  # noqa: S608  # A constant.
_UNFENCE = "UPDATE owned_slots SET state = 'own' WHERE slot BETWEEN $1 AND $2 AND state = 'fenced'"
_OPEN_TO_READS = """
INSERT INTO owned_slots (slot, state) SELECT generate_series($1::int, $2::int), 'fenced'
ON CONFLICT (slot) DO UPDATE SET state = 'fenced'
"""
_CLOSE = "UPDATE owned_slots SET state = 'gone' WHERE slot BETWEEN $1 AND $2 AND state <> 'gone'"
_GIVE_UP = "UPDATE owned_slots SET state = 'gone', departure_id = $3 WHERE slot BETWEEN $1 AND $2 AND state <> 'gone'"
_TAKE = "UPDATE owned_slots SET state = 'own', departure_id = NULL WHERE slot BETWEEN $1 AND $2 AND state <> 'own'"
_DEPART = """
INSERT INTO departures (shard_id, address, epoch, timeline, lsn) VALUES ($1, $2, $3, $4, $5) RETURNING departure_id
"""
_FORGET_DEPARTURES = """
DELETE FROM departures WHERE NOT EXISTS (
    SELECT FROM owned_slots WHERE owned_slots.departure_id = departures.departure_id
)
"""
_KNOW_EPOCH = "UPDATE identity SET epoch = $1 WHERE epoch < $1"
_COUNT = "SELECT count(*) FROM owned_slots WHERE slot BETWEEN $1 AND $2 AND state = $3"


class FenceError(Exception):
    """The slots could not be fenced in time; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Where slots went, for those who still ask here."""

    shard_id: str
    address: str
    epoch: int
    position: Position


async def fence(side: Side, first: int, last: int, *, timeout_s: float, move_id: int, way: str, mark: int) -> None:
    """Keeps everybody from writing to the slots, and sets a mark behind the last write. Raises FenceError."""
    connection = side.connection
    try:
        async with connection.transaction():
            await connection.execute(_LOCK_TIMEOUT, f"{max(1, int(timeout_s * 1000))}ms")
            await connection.execute(_LOCK)
            fenced = await connection.fetchval(_FENCE, first, last)
            if fenced != last - first + 1:
                raise FenceError(f"{side.shard_id} has only {fenced} of the slots {first} to {last}")
            await connection.execute(_SET_MARK, first, move_id, way, mark)
    except asyncpg.LockNotAvailableError as error:
        raise FenceError("writes under way did not end in time") from error


async def unfence(side: Side, first: int, last: int) -> None:
    """Takes a fence away, if there is one."""
    await side.connection.execute(_UNFENCE, first, last)


async def open_to_reads(side: Side, first: int, last: int) -> Position:
    """Lets the taker answer reads, though no writes yet; the place in its log at which it has all rows.

    It is a commit that waits for a quorum of the standbys, and with it for all that came before: rows that came by
    replication wait for nobody.
    """
    await side.connection.execute(_OPEN_TO_READS, first, last)
    return await read_position(side.connection)


async def close_to_reads(side: Side, first: int, last: int) -> None:
    """Takes that back, on a shard that was not to have the slots after all."""
    await side.connection.execute(_CLOSE, first, last)


async def give_up(side: Side, first: int, last: int, departure: Departure) -> None:
    """Has the giver send away whoever asks for the slots, and say where they are."""
    connection, here = side.connection, departure.position
    async with connection.transaction():
        departure_id = await connection.fetchval(
            _DEPART, departure.shard_id, departure.address, departure.epoch, here.timeline, here.lsn
        )
        await connection.execute(_GIVE_UP, first, last, departure_id)
        await connection.execute(_KNOW_EPOCH, departure.epoch)


async def forget_departures(side: Side) -> None:
    """Removes those that no slot refers to any more."""
    await side.connection.execute(_FORGET_DEPARTURES)


async def take(side: Side, first: int, last: int, epoch: int) -> None:
    """Lets the taker take writes."""
    async with side.connection.transaction():
        await side.connection.execute(_TAKE, first, last)
        await side.connection.execute(_KNOW_EPOCH, epoch)


async def has_all(side: Side, first: int, last: int, state: str) -> bool:
    """Whether all of the slots are in a state."""
    count: int = await side.connection.fetchval(_COUNT, first, last, state)
    return count == last - first + 1
