"""Claims: who has an id, for placements under which a memory's slot does not follow from user and id.

Ids are unique per user. Where a memory's slot follows from user and id, the primary key of `memories` sees to that;
with placement by content or by type, two memories with one id could end up in two slots. So the id is claimed first, in
the slot that user and id give, for one digest and one memory slot; the claim also says where the memory is.
"""

from collections.abc import Sequence

from common.errors import AlreadyExists, InvalidArgument
from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from shard.expiry import is_past, too_late
from shard.ownership import NotOwnedError

_CLAIM = """
WITH items AS (
    SELECT * FROM unnest($1::int[], $2::text[], $3::uuid[], $4::bytea[], $5::int[], $6::boolean[]) WITH ORDINALITY
    AS item (slot, user_id, id, digest, memory_slot, late, number)
), own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = ANY ($1::int[]) AND state = 'own' ORDER BY slot FOR SHARE
), claimed AS (
    INSERT INTO claims (slot, user_id, id, digest, memory_slot)
    SELECT slot, user_id, id, digest, memory_slot FROM items JOIN own USING (slot) WHERE NOT late
    ORDER BY slot, user_id, id, number
    ON CONFLICT (slot, user_id, id) DO NOTHING
    RETURNING 1
)
SELECT ARRAY(SELECT slot FROM own) AS owned, (SELECT count(*) FROM claimed) AS claimed
"""
# A statement of its own: it sees what the first one waited for.
_FIND_DIGESTS = """
SELECT claims.slot, claims.user_id, claims.id, digest
FROM unnest($1::int[], $2::text[], $3::uuid[]) AS item (slot, user_id, id)
JOIN claims ON (claims.slot, claims.user_id, claims.id) = (item.slot, item.user_id, item.id)
"""
_FIND = """
SELECT owned_slots.slot AS served, claims.memory_slot FROM owned_slots
LEFT JOIN claims ON claims.slot = owned_slots.slot AND user_id = $2 AND id = $3
WHERE owned_slots.slot = $1 AND state IN ('own', 'fenced')
"""


async def claim(
    connection: Connection, items: Sequence[shard_pb2.ClaimItem]
) -> tuple[list[AlreadyExists | InvalidArgument | NotOwnedError | None], bool]:
    """Takes every id that is free; what became of each, in order: None when it is taken for this digest.

    And whether any of them was taken before.
    """
    keys = [(item.home_slot, item.user_id, item.id) for item in items]
    slots, users, ids = (list(column) for column in zip(*keys, strict=True))
    row = await connection.fetchrow(
        _CLAIM,
        slots,
        users,
        ids,
        [item.digest for item in items],
        [item.memory_slot for item in items],
        [is_past(item) for item in items],
    )
    assert row is not None
    owned = set(row["owned"])
    rows = await connection.fetch(_FIND_DIGESTS, slots, users, ids)
    digests = {(row["slot"], row["user_id"], str(row["id"])): row["digest"] for row in rows}
    outcomes: list[AlreadyExists | InvalidArgument | NotOwnedError | None] = []
    for key, item in zip(keys, items, strict=True):
        if item.home_slot not in owned:
            outcomes.append(NotOwnedError())
        elif digests.get(key) == item.digest:
            outcomes.append(None)
        elif key not in digests:
            outcomes.append(too_late())
        else:
            outcomes.append(AlreadyExists(f"the id {item.id} is taken by other content"))
    return outcomes, outcomes.count(None) > row["claimed"]


async def find(connection: Connection, slot: int, user_id: str, memory_id: str) -> int | None:
    """The slot of the memory with this id; None when nobody has taken the id. Raises NotOwnedError."""
    row = await connection.fetchrow(_FIND, slot, user_id, memory_id)
    if row is None:
        raise NotOwnedError
    found: int | None = row["memory_slot"]
    return found
