"""Who has the slots, in the shards' own databases: fencing them, taking a fence away, handing them over.

A fence is committed, and like every commit waits for the standbys: it outlives a failover.
"""

import asyncio
import time
from dataclasses import dataclass

import asyncpg

from shard.moving.side import Side
from shard.position import Position, read_position

# All that is written to the shard waits in the queue for the fence's lock too, whatever its slot. So who waits for it
# does so for a short time, steps back for what has gathered behind, and comes again with twice the patience: at last
# for as long as a hand-over may take.
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 0.5
_STEP_BACK_S = 0.1
# Each of these is one statement, and so one round trip of the time in which nobody may write.
_FENCE = "SELECT fence_slots($1, $2, $3, $4, $5, $6)"
_UNFENCE = "UPDATE owned_slots SET state = 'own' WHERE slot BETWEEN $1 AND $2 AND state = 'fenced'"
_OPEN_TO_READS = """
INSERT INTO owned_slots (slot, state) SELECT generate_series($1::int, $2::int), 'fenced'
ON CONFLICT (slot) DO UPDATE SET state = 'fenced'
"""
# Not one of them where any is the shard's own.
_CLOSE = """
WITH owned AS (
    SELECT count(*) AS slots FROM owned_slots WHERE slot BETWEEN $1 AND $2 AND state = 'own'
), closed AS (
    UPDATE owned_slots SET state = 'gone' FROM owned WHERE slot BETWEEN $1 AND $2 AND state = 'fenced' AND slots = 0
)
SELECT slots FROM owned
"""
_COUNT_OWN = "SELECT count(*) FROM owned_slots WHERE slot BETWEEN $1 AND $2 AND state = 'own'"
# Whoever finds the slots gone has done this before.
_GIVE_UP = """
WITH departed AS (
    INSERT INTO departures (shard_id, address, epoch, timeline, lsn)
    SELECT $3::text, $4::text, $5::bigint, $6::int, $7::bigint
    WHERE EXISTS (SELECT FROM owned_slots WHERE slot BETWEEN $1 AND $2 AND state <> 'gone')
    RETURNING departure_id
), given AS (
    UPDATE owned_slots SET state = 'gone', departure_id = departed.departure_id FROM departed
    WHERE slot BETWEEN $1 AND $2 AND state <> 'gone'
)
UPDATE identity SET epoch = $5 WHERE epoch < $5
"""
_TAKE = """
WITH taken AS (
    UPDATE owned_slots SET state = 'own', departure_id = NULL WHERE slot BETWEEN $1 AND $2 AND state <> 'own'
)
UPDATE identity SET epoch = $3 WHERE epoch < $3
"""
_FORGET_DEPARTURES = """
DELETE FROM departures WHERE NOT EXISTS (
    SELECT FROM owned_slots WHERE owned_slots.departure_id = departures.departure_id
)
"""
# Slots that there are not.
_NONE = (0, -1)


class FenceError(Exception):
    """The slots could not be fenced in time; nothing has changed."""


class OwnershipError(Exception):
    """A shard has slots that it should not have, or has not those that it should; the move must not go on."""


@dataclass(frozen=True, slots=True)
class Departure:
    """Where slots went, for those who still ask here."""

    shard_id: str
    address: str
    epoch: int
    position: Position


@dataclass(frozen=True, slots=True)
class Fence:
    """A fence that stands."""

    since: float
    """Since when nobody could write, by the monotonic clock: since the mover began to wait for the last time."""
    mark: int
    """Whoever has it has all that was written before."""


async def rehearse(giver: Side, taker: Side) -> None:
    """Has both servers make ready for what they are asked while nobody may write: each statement once, about no slot.

    The first time, a statement takes a round trip more, and the session reads from the catalogs what it needs.
    """
    nowhere = Departure("", "", 0, Position(0, 0, waits=False, server=""))
    await giver.connection.execute(_FENCE, *_NONE, 0, "", 0, 0)
    await open_to_reads(taker, *_NONE)
    await give_up(giver, *_NONE, nowhere)
    await take(taker, *_NONE, 0)


async def fence(side: Side, first: int, last: int, *, timeout_s: float, move_id: int, way: str, mark: int) -> Fence:
    """Keeps everybody from writing to the slots, and sets a mark behind the last write: `mark`, or a higher one where
    there was one as high. Raises FenceError.

    While it waits for the writes under way it keeps nobody from writing to the shard for longer than half a second.
    """
    connection, deadline = side.connection, time.monotonic() + timeout_s
    patience_s = _FIRST_WAIT_S
    while True:
        began = time.monotonic()
        wait_s = min(patience_s, deadline - began)
        patience_s = min(2 * patience_s, _LONGEST_WAIT_S)
        patience_ms = max(1, int(wait_s * 1000))
        try:
            set_mark = await connection.fetchval(_FENCE, first, last, move_id, way, mark, patience_ms)
        except asyncpg.LockNotAvailableError as error:
            if deadline - time.monotonic() <= _STEP_BACK_S:
                raise FenceError("writes under way did not end in time") from error
        except asyncpg.RaiseError as error:
            raise FenceError(f"{side.shard_id}: {error}") from error
        else:
            return Fence(began, set_mark)
        await asyncio.sleep(_STEP_BACK_S)


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
    """Takes that back, on a shard that was not to have the slots after all.

    Raises OwnershipError when it has some of them: nothing has changed then. What no step before the cutover does to a
    target is to let it take writes, so the move is wrong about who has the slots.
    """
    if owned := await side.connection.fetchval(_CLOSE, first, last):
        raise OwnershipError(f"{side.shard_id} serves {owned} of the slots {first} to {last}; nothing is changed")


async def check_owner(side: Side, first: int, last: int) -> None:
    """Raises OwnershipError unless the shard takes writes to every one of the slots."""
    owned = await side.connection.fetchval(_COUNT_OWN, first, last)
    if owned != last - first + 1:
        raise OwnershipError(f"{side.shard_id} has only {owned} of the slots {first} to {last}; nothing is removed")


async def give_up(side: Side, first: int, last: int, departure: Departure) -> None:
    """Has the giver send away whoever asks for the slots, and say where they are; nothing if it does so already."""
    where, here = (departure.shard_id, departure.address), departure.position
    await side.connection.execute(_GIVE_UP, first, last, *where, departure.epoch, here.timeline, here.lsn)


async def forget_departures(side: Side) -> None:
    """Removes those that no slot refers to any more."""
    await side.connection.execute(_FORGET_DEPARTURES)


async def take(side: Side, first: int, last: int, epoch: int) -> None:
    """Lets the taker take writes."""
    await side.connection.execute(_TAKE, first, last, epoch)
