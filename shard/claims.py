"""Claims: who has an id, for placements under which a memory's slot does not follow from user and id.

Ids are unique per user. Where a memory's slot follows from user and id, the primary key of `memories` sees to that;
with placement by content or by type, two memories with one id could end up in two slots. So the id is claimed first, in
the slot that user and id give, for one digest and one memory slot; the claim also says where the memory is.
"""

from collections.abc import Sequence

from common.errors import AlreadyExists, InvalidArgument, Unavailable
from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from shard.expiry import is_past, too_late
from shard.ownership import NotOwnedError
from shard.refusal import being_removed

# How often an erasure can take a claim away between the attempt to make it and the look at whose it is.
_ATTEMPTS = 3

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
) -> tuple[list[AlreadyExists | InvalidArgument | NotOwnedError | Unavailable | None], bool]:
    """Takes every id that is free; what became of each, in order: None when it is taken for this digest.

    And whether any of them was taken before.
    """
    outcomes: dict[int, AlreadyExists | InvalidArgument | NotOwnedError | Unavailable | None] = {}
    left = list(range(len(items)))
    repeated = False
    for _ in range(_ATTEMPTS):
        found, newly = await _claim_once(connection, [items[number] for number in left])
        repeated = repeated or found.count(None) > newly
        outcomes.update(zip(left, found, strict=True))
        left = [number for number in left if isinstance(outcomes[number], Unavailable)]
        if not left:
            break
    return [outcomes[number] for number in range(len(items))], repeated


async def _claim_once(
    connection: Connection, items: Sequence[shard_pb2.ClaimItem]
) -> tuple[list[AlreadyExists | InvalidArgument | NotOwnedError | Unavailable | None], int]:
    keys = [(item.home_slot, item.user_id, item.id) for item in items]
    late = [is_past(item) for item in items]
    slots, users, ids = (list(column) for column in zip(*keys, strict=True))
    digests, memory_slots = [item.digest for item in items], [item.memory_slot for item in items]
    row = await connection.fetchrow(_CLAIM, slots, users, ids, digests, memory_slots, late)
    assert row is not None
    owned = set(row["owned"])
    rows = await connection.fetch(_FIND_DIGESTS, slots, users, ids)
    taken = {(row["slot"], row["user_id"], str(row["id"])): row["digest"] for row in rows}
    outcomes: list[AlreadyExists | InvalidArgument | NotOwnedError | Unavailable | None] = []
    for key, item, too_old in zip(keys, items, late, strict=True):
        if item.home_slot not in owned:
            outcomes.append(NotOwnedError())
        elif key in taken:
            same = taken[key] == item.digest
            outcomes.append(None if same else AlreadyExists(f"the id {item.id} is taken by other content"))
        elif too_old:
            outcomes.append(too_late())
        else:
            # It was there a moment ago, the new one or another's, and has been erased since.
            outcomes.append(being_removed("memory with this id"))
    return outcomes, row["claimed"]


async def find(connection: Connection, slot: int, user_id: str, memory_id: str) -> int | None:
    """The slot of the memory with this id; None when nobody has taken the id. Raises NotOwnedError."""
    row = await connection.fetchrow(_FIND, slot, user_id, memory_id)
    if row is None:
        raise NotOwnedError
    found: int | None = row["memory_slot"]
    return found
