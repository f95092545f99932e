"""Request ids of users whose memories are in many slots: each is taken in the user's slot, for one request.

A request's effect, and the answer to it, are kept in the memory's slot (`shard.requests`). Where a user has many slots,
two requests with one id could meet in none of them, and a repeated request could be sent to another slot than the
first time. So the id is taken first, where all of the user's requests meet, and with it the slot that it was meant for.
"""

from common.postgres import Connection
from shard import requests
from shard.ownership import NotOwnedError

# Each attempt of the request that has the id is counted, and renews it.
_TAKE = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
)
INSERT INTO request_claims AS claim (slot, user_id, request_id, digest, memory_slot)
SELECT slot, $2, $3, $4, $5 FROM own
ON CONFLICT (slot, user_id, request_id) DO UPDATE SET
    attempts = claim.attempts + (claim.digest = EXCLUDED.digest)::int,
    taken_at = CASE WHEN claim.digest = EXCLUDED.digest THEN now() ELSE claim.taken_at END
RETURNING digest, memory_slot
"""
# An attempt that was refused says nothing of another, which may have had the effect.
_RELEASE = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
), released AS (
    DELETE FROM request_claims USING own
    WHERE request_claims.slot = own.slot AND user_id = $2 AND request_id = $3 AND digest = $4 AND attempts = 1
    RETURNING 1
)
SELECT EXISTS (SELECT FROM own) AS owned, EXISTS (SELECT FROM released) AS released
"""


async def take(
    connection: Connection, slot: int, user_id: str, request_id: str, digest: bytes, memory_slot: int
) -> int:
    """The slot where this request has its effect: `memory_slot`, or the one that an earlier attempt took the id with.

    Raises NotOwnedError, InvalidArgument (the id was taken by another request).
    """
    row = await connection.fetchrow(_TAKE, slot, user_id, request_id, digest, memory_slot)
    if row is None:
        raise NotOwnedError
    if row["digest"] != digest:
        raise requests.reused()
    found: int = row["memory_slot"]
    return found


async def release(connection: Connection, slot: int, user_id: str, request_id: str, digest: bytes) -> bool:
    """Gives the id back, if it is this request's, and this was its only attempt.

    Returns whether it did. Raises NotOwnedError.
    """
    row = await connection.fetchrow(_RELEASE, slot, user_id, request_id, digest)
    if row is None or not row["owned"]:
        raise NotOwnedError
    return bool(row["released"])
