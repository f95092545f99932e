"""Request ids of users whose memories are in many slots: each is taken in the user's slot, for one request.

A request's effect, and the answer to it, are kept in the memory's slot (`shard.requests`). Where a user has many slots,
two requests with one id could meet in none of them, and a repeated request could be sent to another slot than the
first time. So the id is taken first, where all of the user's requests meet, and with it the slot that it was meant for.
"""

from common.errors import Unavailable
from common.postgres import Connection
from shard import requests
from shard.ownership import NotOwnedError

# How often a request id can be given back between the attempt to take it and the look at who has it.
_ATTEMPTS = 3

_TAKE = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
), taken AS (
    INSERT INTO request_claims (slot, user_id, request_id, digest, memory_slot) SELECT slot, $2, $3, $4, $5 FROM own
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT EXISTS (SELECT FROM own) AS owned, EXISTS (SELECT FROM taken) AS taken
"""
# A statement of its own: it sees what the first one waited for.
_FIND = "SELECT digest, memory_slot FROM request_claims WHERE slot = $1 AND user_id = $2 AND request_id = $3"
_RELEASE = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
), released AS (
    DELETE FROM request_claims USING own
    WHERE request_claims.slot = own.slot AND user_id = $2 AND request_id = $3 AND digest = $4
    RETURNING 1
)
SELECT EXISTS (SELECT FROM own) AS owned, EXISTS (SELECT FROM released) AS released
"""


async def take(
    connection: Connection, slot: int, user_id: str, request_id: str, digest: bytes, memory_slot: int
) -> tuple[int, bool]:
    """The slot where this request has its effect: `memory_slot`, or the one that an earlier attempt took the id with.

    And whether there was an earlier one.

    Raises NotOwnedError, InvalidArgument (the id was taken by another request).
    """
    for _ in range(_ATTEMPTS):
        attempt = await connection.fetchrow(_TAKE, slot, user_id, request_id, digest, memory_slot)
        if attempt is None or not attempt["owned"]:
            raise NotOwnedError
        row = await connection.fetchrow(_FIND, slot, user_id, request_id)
        if row is None:
            continue
        if row["digest"] != digest:
            raise requests.reused()
        return row["memory_slot"], not attempt["taken"]
    raise Unavailable("the request id keeps being given back; try again", retry_after_s=1.0)


async def release(connection: Connection, slot: int, user_id: str, request_id: str, digest: bytes) -> bool:
    """Gives the id back, if it is this request's; whether it was. Raises NotOwnedError."""
    row = await connection.fetchrow(_RELEASE, slot, user_id, request_id, digest)
    if row is None or not row["owned"]:
        raise NotOwnedError
    return bool(row["released"])
