"""Requests that were applied: what a repeated request id is answered from, kept in the transaction of its effect."""

import hashlib
import json
from typing import Any

from common.errors import InvalidArgument
from common.postgres import Connection

# The constraint that a request id which somebody else has just used violates.
UNIQUE = "applied_requests_pkey"

_FIND = """
SELECT digest, answer::text FROM applied_requests WHERE slot = $1 AND user_id = $2 AND request_id = $3
"""
_RECORD = """
INSERT INTO applied_requests (slot, user_id, request_id, digest, answer) VALUES ($1, $2, $3, $4, $5)
"""


async def find(
    connection: Connection, slot: int, user_id: str, request_id: str, digest: bytes
) -> dict[str, Any] | None:
    """The answer given to this request before, None when it is new.

    Raises InvalidArgument when the id was used for another request.
    """
    row = await connection.fetchrow(_FIND, slot, user_id, request_id)
    if row is None:
        return None
    if row["digest"] != digest:
        raise reused()
    answer: dict[str, Any] = json.loads(row["answer"])
    return answer


async def record(
    connection: Connection, slot: int, user_id: str, request_id: str, digest: bytes, answer: dict[str, Any]
) -> None:
    """Keeps the answer to a request, without any content in it. Raises UniqueViolationError when somebody just did."""
    await connection.execute(_RECORD, slot, user_id, request_id, digest, json.dumps(answer))


def digest_of(kind: str, *parts: str) -> bytes:
    """What a request asks for, to tell its repetition from another request with the same id."""
    digest = hashlib.sha256()
    for part in (kind, *parts):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()


def reused() -> InvalidArgument:
    """The request id names another request."""
    return InvalidArgument.field(
        "request_id", "REQUEST_ID_REUSED", "was used for another request within the last 24 hours"
    )
