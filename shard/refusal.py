"""Why a request cannot be answered here or now: its slots are another shard's, are just being handed over, or its rows
are being taken away."""

from collections.abc import Sequence

from common.departure import MAX_TOLD, Departure
from common.errors import Unavailable, WrongShard
from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from shard.identity import Identity

_EPOCH_AND_FENCE = """
SELECT epoch, EXISTS (
    SELECT FROM unnest($1::int[], $2::int[]) AS asked (first, last)
    JOIN owned_slots ON slot BETWEEN asked.first AND asked.last WHERE state = 'fenced'
) AS fenced
FROM identity
"""
# As ranges: those of a move are next to each other, and went together.
_DEPARTED = """
SELECT min(slot) AS first, max(slot) AS last, shard_id, address, epoch, timeline, lsn
FROM (
    SELECT slot, departure_id, slot - row_number() OVER (PARTITION BY departure_id ORDER BY slot) AS gaps
    FROM unnest($1::int[], $2::int[]) AS asked (first, last)
    JOIN owned_slots ON slot BETWEEN asked.first AND asked.last WHERE state = 'gone' AND departure_id IS NOT NULL
) AS gone
JOIN departures USING (departure_id)
GROUP BY departure_id, gaps, shard_id, address, epoch, timeline, lsn
ORDER BY epoch DESC, first LIMIT $3
"""


async def refusal(connection: Connection, known: Identity, ranges: Sequence[shard_pb2.SlotRange]) -> WrongShard:
    """What a caller is told who asked for slots in `ranges` that are not all this shard's."""
    firsts, lasts = [asked.first for asked in ranges], [asked.last for asked in ranges]
    row = await connection.fetchrow(_EPOCH_AND_FENCE, firsts, lasts)
    assert row is not None
    departed = await connection.fetch(_DEPARTED, firsts, lasts, MAX_TOLD)
    return WrongShard(
        f"not served by {known.shard_id} of cluster {known.cluster_id}",
        epoch=row["epoch"],
        fenced=row["fenced"],
        departures=tuple(Departure(source=known.shard_id, **dict(gone)) for gone in departed),
    )


def being_removed(what: str) -> Unavailable:
    """What a write is told that found its row taken, and then gone. The shard is well: no breaker counts it."""
    return Unavailable(f"the {what} is being removed; try again", reason="SLOT_BUSY", retry_after_s=1.0)
