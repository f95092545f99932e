"""One way of a move: a publication with a row filter, a replication slot, and a subscription that takes from them.

Both ways of a move say `origin = none`: a subscription gets what was written at the other side, and nothing that came
there by replication, so that no row goes in a ring. A slot is made by itself, before its subscription: whatever of the
two a mover that died has left behind is found by name.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shard.moving.side import Side
from shard.moving.tables import MARKS, MOVED, STREAM_PREFIX

# Ending the process that sends from a slot, or the one that takes from it.
_DROP_TIMEOUT_S = 15.0
_POLL_S = 0.05
_MARK_POLL_S = 0.004
# How often somebody who waits for what comes by a slot looks whether it still can.
_SLOT_CHECK_S = 1.0

_HAS_PUBLICATION = "SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)"
_HAS_SLOT = "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1)"
# One that was invalidated, as when it kept more log than a server may keep for it, stays, and nobody can take from it.
_HAS_WHOLE_SLOT = """
SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND wal_status IS DISTINCT FROM 'lost')
"""
_HAS_SUBSCRIPTION = """
SELECT EXISTS (
    SELECT FROM pg_subscription JOIN pg_database ON pg_database.oid = subdbid
    WHERE subname = $1 AND datname = current_database()
)
"""
# These statements take no parameters, so the server makes them from some, quoting names (%I) and values (%L). The
# tables' names are ours, and the slots are numbers.
_CREATE_PUBLICATION = (
    "SELECT format('CREATE PUBLICATION %1$I FOR TABLE "
    + ", ".join(f"{table} WHERE (slot >= %2$s AND slot <= %3$s)" for table in (*MOVED, MARKS))
    + "', $1::text, $2::int, $3::int)"
)
# Of which server the subscriber is, for whoever has to do without it.
_NOTE = "SELECT format('COMMENT ON PUBLICATION %I IS %L', $1::text, $2::text)"
_NOTED = "SELECT obj_description(oid, 'pg_publication') FROM pg_publication WHERE pubname = $1"
_DROP_PUBLICATION = "SELECT format('DROP PUBLICATION IF EXISTS %I', $1::text)"
_CREATE_SLOT = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')"
_DROP_SLOT = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1 AND NOT active"
_END_SENDER = """
SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid IS NOT NULL
"""
_CREATE_SUBSCRIPTION = """
SELECT format(
    'CREATE SUBSCRIPTION %1$I CONNECTION %2$L PUBLICATION %3$I WITH (create_slot = false, slot_name = %4$L,
     enabled = %5$s, copy_data = %6$s, origin = none, binary = true, streaming = off)',
    $1::text, $2::text, $3::text, $1::text, $4::text, $5::text)
"""
_RECONNECT = "SELECT format('ALTER SUBSCRIPTION %I CONNECTION %L', $1::text, $2::text)"
_ENABLE = "SELECT format('ALTER SUBSCRIPTION %I ENABLE', $1::text)"
_ABANDON = """
SELECT format('ALTER SUBSCRIPTION %1$I DISABLE; ALTER SUBSCRIPTION %1$I SET (slot_name = NONE);
               DROP SUBSCRIPTION %1$I', $1::text)
"""
# The slots that the initial copies of tables make. Named pg_SUBSCRIPTION_sync_TABLE_SYSTEM, with the subscriber's
# system identifier; those of subscriptions that are there belong to somebody.
_SYNC_SLOTS = """
SELECT slot_name FROM pg_replication_slots
WHERE slot_name ~ ('^pg_[0-9]+_sync_[0-9]+_' || $1 || '$')
    AND substring(slot_name FROM '^pg_([0-9]+)_sync_')::oid <> ALL ($2::oid[])
"""
_SUBSCRIPTIONS = """
SELECT coalesce(array_agg(pg_subscription.oid), '{}') FROM pg_subscription
"""
# Each mark is higher than those before it, whatever the clock says of the machine that the mover is on now: otherwise
# one that has long arrived would stand for one that has not.
_SET_MARK = f"""
INSERT INTO {MARKS} AS known (slot, move_id, way, mark) VALUES ($1, $2, $3, $4)
ON CONFLICT (slot, move_id, way) DO UPDATE SET mark = greatest(excluded.mark, known.mark + 1)
RETURNING mark
"""  # noqa: S608  # A constant, here as below.
_GET_MARK = f"SELECT mark FROM {MARKS} WHERE slot = $1 AND move_id = $2 AND way = $3"  # noqa: S608
_TABLE_STATES = """
SELECT srrelid::regclass::text AS name, srsubstate::text AS state, coalesce(tuples_processed, 0) AS copied
FROM pg_subscription_rel JOIN pg_subscription ON pg_subscription.oid = srsubid
LEFT JOIN pg_stat_progress_copy AS copying ON copying.relid = srrelid AND copying.command = 'COPY FROM'
WHERE subname = $1
"""
_ERRORS = "SELECT apply_error_count + sync_error_count FROM pg_stat_subscription_stats WHERE subname = $1"


class StreamError(Exception):
    """Replication does not do what it should; the message says where to look."""


class SlotLostError(StreamError):
    """A replication slot is gone, or was invalidated: what was to come by it never will."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What flows from `publisher` to `subscriber`. `way` is `forward` or `reverse`."""

    publisher: Side
    subscriber: Side
    move_id: int
    way: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of the publication, the slot and the subscription."""
        return name_of(self.move_id, self.way)

    async def publish(self) -> None:
        """Makes the publication, if it is not there."""
        if not await self.publisher.connection.fetchval(_HAS_PUBLICATION, self.name):
            await _made(self.publisher, _CREATE_PUBLICATION, self.name, self.first, self.last)
        await _made(self.publisher, _NOTE, self.name, self.subscriber.system)

    async def make_slot(self) -> None:
        """Makes the slot, if it is not there. Waits for every transaction that is open on the publisher."""
        await make_slot(self.publisher, self.name)

    async def has_slot(self) -> bool:
        """Whether there is the slot, and everything that is to come by it."""
        return await _has_slot(self.publisher, self.name)

    async def require_slot(self) -> None:
        """Raises SlotLostError unless there is."""
        if not await self.has_slot():
            raise SlotLostError(
                f"the replication slot {self.name} on {self.publisher.shard_id} is gone or was invalidated"
            )

    async def is_cut(self) -> bool:
        """Whether somebody is there to take, and nothing to take from."""
        return await self.is_subscribed() and not await self.has_slot()

    async def subscribe(self, *, enabled: bool, copy: bool) -> None:
        """Makes the subscription, if it is not there; with `copy` it begins with all rows that there are."""
        if not await self.is_subscribed():
            flags = [str(flag).lower() for flag in (enabled, copy)]
            await _made(self.subscriber, _CREATE_SUBSCRIPTION, self.name, self.publisher.dsn, self.name, *flags)

    async def reconnect(self) -> None:
        """Has the subscriber, if there is a subscription, reach the publisher by the URL as it is now: the password
        is not always that of the day when it was made. Who takes is restarted only if there is a difference.
        """
        if await self.is_subscribed():
            # Whether it is another is for the server to see: nobody but a superuser may read what it has.
            await _made(self.subscriber, _RECONNECT, self.name, self.publisher.dsn)

    async def is_subscribed(self) -> bool:
        """Whether there is the subscription."""
        return await _is_subscribed(self.subscriber, self.name)

    async def enable(self) -> None:
        """Lets it flow."""
        await _made(self.subscriber, _ENABLE, self.name)

    async def remove(self) -> None:
        """Removes all that there is of it: first whoever takes, then what is taken from."""
        await unsubscribe(self.subscriber, self.name)
        alive = await self.subscriber.connection.fetchval(_SUBSCRIPTIONS)
        await unpublish(self.publisher, self.name, *await _sync_slots(self.publisher, self.subscriber.system, alive))

    async def is_gone(self) -> bool:
        """Whether nothing flows this way any more, nor could: there is no subscription and no slot."""
        return not await self.is_subscribed() and not await self.publisher.connection.fetchval(_HAS_SLOT, self.name)

    async def mark(self) -> int:
        """Writes a mark among the rows; whoever has it has all that was committed before it."""
        mark: int = await self.publisher.connection.fetchval(
            _SET_MARK, self.first, self.move_id, self.way, time.time_ns()
        )
        return mark

    async def arrived(self, mark: int, timeout_s: float) -> None:
        """Returns once the subscriber has the mark. Raises TimeoutError, SlotLostError."""
        looked = time.monotonic()
        async with asyncio.timeout(timeout_s):
            # Nothing tells us; we have to ask.
            while await self._seen() < mark:
                if time.monotonic() - looked >= _SLOT_CHECK_S:
                    await self.require_slot()
                    looked = time.monotonic()
                await asyncio.sleep(_MARK_POLL_S)

    async def caught_up(self, timeout_s: float) -> float:
        """Has the subscriber catch up with what there is now; the seconds that it took. Raises TimeoutError."""
        began = time.monotonic()
        await self.arrived(await self.mark(), timeout_s)
        return time.monotonic() - began

    async def tables(self) -> dict[str, tuple[str, int]]:
        """Of each table, the state of its initial copy (`r`: it follows), and the rows copied so far."""
        rows = await self.subscriber.connection.fetch(_TABLE_STATES, self.name)
        return {row["name"]: (row["state"], row["copied"]) for row in rows}

    async def errors(self) -> int:
        """How often the subscriber has failed to take something."""
        return int(await self.subscriber.connection.fetchval(_ERRORS, self.name) or 0)

    async def _seen(self) -> int:
        return int(await self.subscriber.connection.fetchval(_GET_MARK, self.first, self.move_id, self.way) or 0)


def name_of(move_id: int, way: str) -> str:
    """Name of the publication, the slot and the subscription of a move's stream."""
    return f"{STREAM_PREFIX}{move_id}_{way}"


async def unsubscribe(subscriber: Side, name: str) -> None:
    """Removes a subscription, if it is there, without a word to the publisher, which may be gone."""
    if await _is_subscribed(subscriber, name):
        await _made(subscriber, _ABANDON, name)


async def unpublish(publisher: Side, name: str, *sync_slots: str) -> None:
    """Removes a publication and its slot, and those of initial copies that are named. Raises StreamError."""
    for slot in (name, *sync_slots):
        await drop_slot(publisher, slot)
    await _made(publisher, _DROP_PUBLICATION, name)


async def sync_slots(publisher: Side, name: str) -> list[str]:
    """The slots of initial copies of whoever takes from the stream, or has taken from another one before, by what the
    publication says of it: it may be gone. Empty where it says nothing.
    """
    system = await publisher.connection.fetchval(_NOTED, name)
    return [] if system is None else await _sync_slots(publisher, system, [])


async def make_slot(publisher: Side, name: str) -> None:
    """Makes a logical replication slot, if it is not there. One that was invalidated is replaced."""
    if not await _has_slot(publisher, name):
        await drop_slot(publisher, name)
        await publisher.connection.execute(_CREATE_SLOT, name)


async def drop_slot(publisher: Side, name: str) -> None:
    """Drops a replication slot, and ends who takes from it. Raises StreamError."""
    deadline = time.monotonic() + _DROP_TIMEOUT_S
    while await publisher.connection.fetchval(_HAS_SLOT, name):
        await publisher.connection.execute(_END_SENDER, name)
        await publisher.connection.execute(_DROP_SLOT, name)
        if time.monotonic() >= deadline:
            raise StreamError(f"the replication slot {name} on {publisher.shard_id} is in use and cannot be dropped")
        await asyncio.sleep(_POLL_S)


async def _sync_slots(publisher: Side, system: str, alive: Sequence[int]) -> list[str]:
    """Those of a server's subscriptions, but for the ones that are `alive`."""
    return [row["slot_name"] for row in await publisher.connection.fetch(_SYNC_SLOTS, system, alive)]


async def _is_subscribed(subscriber: Side, name: str) -> bool:
    found: bool = await subscriber.connection.fetchval(_HAS_SUBSCRIPTION, name)
    return found


async def _has_slot(publisher: Side, name: str) -> bool:
    found: bool = await publisher.connection.fetchval(_HAS_WHOLE_SLOT, name)
    return found


async def _made(side: Side, statement: str, *values: Any) -> None:
    """Has the server make a statement from values, and runs it."""
    await side.connection.execute(await side.connection.fetchval(statement, *values))
