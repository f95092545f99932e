"""Writes of one memory: each a single statement that owns the slot, has its effect once, and commits by itself.

Ownership is the row of `owned_slots`, joined FOR SHARE inside the statement: a write that meets a fence waits for it,
re-reads the row, and then finds nothing to insert from. A plain check in the same statement would still see the state
from before the wait (docs/decisions/0003-ownership-in-the-statement.md).
"""

import hashlib
from datetime import UTC, datetime

import asyncpg

from common.errors import AlreadyExists, InvalidArgument, Unavailable
from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard.identity import Identity
from shard.rows import COLUMNS, from_microseconds, to_json, to_memory, to_timestamp, to_vector

_STORE = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
), stored AS (
    INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                          embedding, embedding_model, expire_time)
    SELECT own.slot, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13 FROM own
    WHERE $13::timestamptz IS NULL OR $13 > now()
    ON CONFLICT (slot, user_id, id) DO NOTHING
    RETURNING create_time, update_time, version
)
SELECT EXISTS (SELECT FROM own) AS owned, stored.*
FROM (VALUES (1)) AS one LEFT JOIN stored ON true
"""
_FIND_STORED = f"""
SELECT digest, deleted_at, {COLUMNS} FROM memories WHERE slot = $1 AND user_id = $2 AND id = $3
"""  # noqa: S608  # COLUMNS is a constant.
_DELETE = """
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
), emptied AS (
    UPDATE memories SET deleted_at = now(), content = '', metadata = '{}', embedding = NULL, agent_id = '',
                        session_id = ''
    FROM own
    WHERE memories.slot = own.slot AND user_id = $2 AND id = $3 AND deleted_at IS NULL
        AND (expire_time IS NULL OR expire_time > now())
    RETURNING 1
), applied AS (
    INSERT INTO applied_requests (slot, user_id, request_id, digest, outcome)
    SELECT own.slot, $2, $4, $5, EXISTS (SELECT FROM emptied) FROM own
    RETURNING outcome
)
SELECT EXISTS (SELECT FROM own) AS owned, applied.outcome
FROM (VALUES (1)) AS one LEFT JOIN applied ON true
"""
_FIND_APPLIED = """
SELECT digest, outcome FROM applied_requests WHERE slot = $1 AND user_id = $2 AND request_id = $3
"""
# pg_walfile_name begins with the timeline in hex; pg_control_checkpoint still has the old one after a promotion.
_POSITION = """
SELECT ('x' || left(pg_walfile_name(lsn), 8))::bit(32)::int AS timeline, (lsn - '0/0')::bigint AS lsn
FROM (SELECT pg_current_wal_lsn() AS lsn) AS here
"""

# A conflicting row can vanish between the insert and the look at it only by being purged, a day old.
_STORE_ATTEMPTS = 3


class NotOwnedError(Exception):
    """The slot is not this shard's to write, any more or yet."""


async def store(connection: Connection, identity: Identity, slot: int, memory: pb.Memory, digest: bytes) -> pb.Memory:
    """Stores `memory` once; returns it as stored, without its embedding. The same digest again is the same success.

    Raises NotOwnedError, AlreadyExists (the id has, or had within the tombstone's life, other content).
    """
    expire_time = from_microseconds(memory.expire_time.ToMicroseconds()) if memory.HasField("expire_time") else None
    embedding = to_vector(memory.embedding, identity.precision) if memory.embedding else None
    for _ in range(_STORE_ATTEMPTS):
        row = await connection.fetchrow(
            _STORE,
            slot,
            memory.user_id,
            memory.id,
            digest,
            memory.agent_id,
            memory.session_id,
            memory.type,
            memory.importance,
            memory.content,
            to_json(memory.metadata),
            embedding,
            memory.embedding_model,
            expire_time,
        )
        if row is None or not row["owned"]:
            raise NotOwnedError
        if row["version"] is not None:
            return _as_stored(memory, row)
        found = await connection.fetchrow(_FIND_STORED, slot, memory.user_id, memory.id)
        if found is not None:
            return _repeated(memory, digest, found)
        if expire_time is not None and expire_time <= datetime.now(UTC):
            raise InvalidArgument.field("memory.expire_time", "EXPIRE_TIME_IN_PAST", "is in the past")
    raise Unavailable("the memory with this id is being purged; try again", retry_after_s=1.0)


async def delete(connection: Connection, slot: int, user_id: str, memory_id: str, request_id: str) -> bool:
    """Empties a memory to a tombstone, once; False when there was none. The same request id has the same answer.

    Raises NotOwnedError, InvalidArgument (the request id was used for another request).
    """
    digest = hashlib.sha256(b"delete\0" + memory_id.encode()).digest()
    try:
        row = await connection.fetchrow(_DELETE, slot, user_id, memory_id, request_id, digest)
    except asyncpg.UniqueViolationError:
        applied = await connection.fetchrow(_FIND_APPLIED, slot, user_id, request_id)
        if applied is None:
            raise Unavailable("the request id is being purged; try again", retry_after_s=1.0) from None
        if applied["digest"] != digest:
            raise InvalidArgument.field(
                "request_id", "REQUEST_ID_REUSED", "was used for another request within the last 24 hours"
            ) from None
        repeated: bool = applied["outcome"]
        return repeated
    if row is None or not row["owned"]:
        raise NotOwnedError
    outcome: bool = row["outcome"]
    return outcome


async def read_position(connection: Connection) -> shard_pb2.Commit:
    """How far the write-ahead log has come; asked after a commit, it covers that commit."""
    row = await connection.fetchrow(_POSITION)
    assert row is not None
    return shard_pb2.Commit(timeline=row["timeline"], lsn=row["lsn"], durability=pb.DURABILITY_LOCAL)


def _as_stored(memory: pb.Memory, row: asyncpg.Record) -> pb.Memory:
    stored = pb.Memory()
    stored.CopyFrom(memory)
    stored.embedding_state = pb.EMBEDDING_STATE_READY if memory.embedding else pb.EMBEDDING_STATE_PENDING
    stored.ClearField("embedding")
    stored.create_time.CopyFrom(to_timestamp(row["create_time"]))
    stored.update_time.CopyFrom(to_timestamp(row["update_time"]))
    stored.version = row["version"]
    return stored


def _repeated(memory: pb.Memory, digest: bytes, found: asyncpg.Record) -> pb.Memory:
    if found["digest"] != digest:
        gone = " of a memory deleted within the last 24 hours" if found["deleted_at"] else ""
        raise AlreadyExists(f"the id {memory.id} is taken by other content{gone}")
    if found["deleted_at"]:
        # Its content is gone for good; a late retry hears what the first attempt would have.
        return _as_stored(memory, found)
    return to_memory(found)
