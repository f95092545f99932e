"""Requests to erase users whose memories are in many slots: that one is over is kept in the user's slot.

Slots move between shards while a request may still be repeated. What a shard has removed says nothing of the slots that
it has by then; the user's slot takes what is known there along.
"""

import hashlib

from common.postgres import Connection
from shard.erase import Erased
from shard.ownership import NotOwnedError

_FIND = """
SELECT request_hash IS NOT NULL AS over, memories, versions FROM owned_slots
LEFT JOIN erasures ON erasures.slot = owned_slots.slot AND request_hash = $2
WHERE owned_slots.slot = $1 AND state = 'own'
"""
# What was recorded first stays: the same request has one answer.
_RECORD = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
)
INSERT INTO erasures (slot, request_hash, memories, versions, done) SELECT slot, $2, $3, $4, true FROM own
ON CONFLICT (slot, request_hash) DO UPDATE SET done = true
RETURNING memories, versions
"""


async def find(connection: Connection, slot: int, request_id: str) -> Erased | None:
    """The totals of a request that is over; None when it is not. `request_id` stands for the user as well.

    Raises NotOwnedError.
    """
    row = await connection.fetchrow(_FIND, slot, _hash(request_id))
    if row is None:
        raise NotOwnedError
    return Erased(row["memories"], row["versions"], frozenset(), repeated=True) if row["over"] else None


async def record(connection: Connection, slot: int, request_id: str, memories: int, versions: int) -> Erased:
    """Keeps for a day that a request is over; its totals, which are an earlier attempt's if one was over before.

    Raises NotOwnedError.
    """
    row = await connection.fetchrow(_RECORD, slot, _hash(request_id), memories, versions)
    if row is None:
        raise NotOwnedError
    return Erased(row["memories"], row["versions"], frozenset(), repeated=False)


def _hash(request_id: str) -> bytes:
    # Another than that by which a shard counts what it removes, perhaps in the same slot.
    return hashlib.sha256(f"over {request_id}".encode()).digest()
