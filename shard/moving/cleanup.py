"""Removing the rows of slots that a shard does not have any more, in batches.

It comes after the proof that nothing replicates from here to the shard that has them: otherwise each row that is
removed here would be removed there too.
"""

import asyncio

from shard.moving.side import Side
from shard.moving.streams import Stream, StreamError
from shard.moving.tables import MARKS, MOVED

# Some milliseconds for one statement, and a pause that leaves the server to others.
_BATCH = 1000
_PAUSE_S = 0.01

# Not one row while anybody may read or write the slots here.
_REMOVE = """
WITH removed AS (
    DELETE FROM {table} WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM {table} WHERE slot >= $1 AND slot <= $2
            AND NOT EXISTS (SELECT FROM owned_slots WHERE slot BETWEEN $1 AND $2 AND state <> 'gone')
        LIMIT $3
    ))
    RETURNING 1
)
SELECT count(*) FROM removed
"""
_SERVES = "SELECT EXISTS (SELECT FROM owned_slots WHERE slot BETWEEN $1 AND $2 AND state <> 'gone')"


async def remove_rows(side: Side, first: int, last: int, *ways: Stream) -> int:
    """Removes all rows of the slots from a shard that does not serve them; how many there were.

    `ways` are the streams by which they came or could go. Raises StreamError unless all of them are gone.
    """
    for way in ways:
        if not await way.is_gone():
            raise StreamError(f"{way.name} still replicates; nothing is removed from {side.shard_id}")
    if await side.connection.fetchval(_SERVES, first, last):
        raise StreamError(f"{side.shard_id} serves some of the slots {first} to {last}; nothing is removed from it")
    removed = 0
    for table in (*MOVED, MARKS):
        while True:
            count: int = await side.connection.fetchval(_REMOVE.format(table=table), first, last, _BATCH)
            removed += count
            if count < _BATCH:
                break
            await asyncio.sleep(_PAUSE_S)
    return removed
