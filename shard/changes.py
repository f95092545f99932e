"""Changing and deleting a memory: one effect for each request id, and the version from before is kept."""

import asyncpg

from common.errors import NotFound, VersionMismatch
from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import ownership, requests
from shard.expiry import is_past, too_late
from shard.identity import Identity
from shard.ownership import NotOwnedError
from shard.refusal import being_removed
from shard.rows import COLUMNS, KEPT_COLUMNS, from_microseconds, to_json, to_memory, to_vector

# How often a request id can vanish between the attempt to use it and the look at who did.
_ATTEMPTS = 3

# A version of this number can only be left over from another memory, which was erased before this one had its id.
_ON_LEFTOVER = """ON CONFLICT (slot, user_id, id, version) DO UPDATE SET
    agent_id = EXCLUDED.agent_id, session_id = EXCLUDED.session_id, type = EXCLUDED.type,
    importance = EXCLUDED.importance, content = EXCLUDED.content, metadata = EXCLUDED.metadata,
    embedding_model = EXCLUDED.embedding_model, pending = EXCLUDED.pending, create_time = EXCLUDED.create_time,
    update_time = EXCLUDED.update_time, expire_time = EXCLUDED.expire_time, replaced_at = EXCLUDED.replaced_at"""
# One statement: owning, emptying, keeping the number of the last version, and the request id.
_DELETE = f"""
WITH own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE
), emptied AS (
    UPDATE memories SET deleted_at = now(), content = '', metadata = '{{}}', embedding = NULL, agent_id = '',
                        session_id = ''
    FROM own
    WHERE memories.slot = own.slot AND user_id = $2 AND id = $3 AND deleted_at IS NULL
        AND (expire_time IS NULL OR expire_time > now())
    RETURNING memories.*
), kept AS (
    INSERT INTO memory_versions (slot, user_id, id, version, agent_id, session_id, type, importance, content, metadata,
                                 embedding_model, pending, create_time, update_time, expire_time)
    SELECT slot, user_id, id, version, '', '', type, importance, '', '{{}}', embedding_model, false, create_time,
           update_time, expire_time
    FROM emptied
    {_ON_LEFTOVER}
), applied AS (
    INSERT INTO applied_requests (slot, user_id, request_id, digest, answer)
    SELECT own.slot, $2, $4, $5, jsonb_build_object('deleted', EXISTS (SELECT FROM emptied)) FROM own
    RETURNING (answer -> 'deleted')::boolean AS deleted
)
SELECT EXISTS (SELECT FROM own) AS owned, applied.deleted
FROM (VALUES (1)) AS one LEFT JOIN applied ON true
"""  # noqa: S608  # A constant, here as below.
# A statement of its own: it sees the version that an update kept which the one above had to wait for.
_FORGET_VERSIONS = """
UPDATE memory_versions SET content = '', metadata = '{}', agent_id = '', session_id = ''
WHERE slot = $1 AND user_id = $2 AND id = $3
"""
_LOCK = """
SELECT version, deleted_at IS NOT NULL OR (expire_time IS NOT NULL AND expire_time <= now()) AS gone
FROM memories WHERE slot = $1 AND user_id = $2 AND id = $3 FOR UPDATE
"""
_KEEP_VERSION = f"""
INSERT INTO memory_versions (slot, user_id, id, version, agent_id, session_id, type, importance, content, metadata,
                             embedding_model, pending, create_time, update_time, expire_time)
SELECT slot, user_id, id, version, agent_id, session_id, type, importance, content, metadata, embedding_model,
       embedding IS NULL, create_time, update_time, expire_time
FROM memories WHERE slot = $1 AND user_id = $2 AND id = $3
{_ON_LEFTOVER}
"""  # noqa: S608
_UPDATE = f"""
UPDATE memories SET
    content = CASE WHEN 'content' = ANY ($4) THEN $5 ELSE content END,
    metadata = CASE WHEN 'metadata' = ANY ($4) THEN $6 ELSE metadata END,
    importance = CASE WHEN 'importance' = ANY ($4) THEN $7 ELSE importance END,
    type = CASE WHEN 'type' = ANY ($4) THEN $8 ELSE type END,
    agent_id = CASE WHEN 'agent_id' = ANY ($4) THEN $9 ELSE agent_id END,
    session_id = CASE WHEN 'session_id' = ANY ($4) THEN $10 ELSE session_id END,
    embedding = CASE WHEN 'embedding' = ANY ($4) THEN $11 ELSE embedding END,
    embedding_model = CASE WHEN 'embedding' = ANY ($4) THEN $12 ELSE embedding_model END,
    expire_time = CASE WHEN 'expire_time' = ANY ($4) THEN $13 ELSE expire_time END,
    version = version + 1,
    update_time = now()
WHERE slot = $1 AND user_id = $2 AND id = $3
RETURNING {COLUMNS}
"""  # noqa: S608
_FIND_VERSION = f"""
SELECT {COLUMNS} FROM memories WHERE slot = $1 AND user_id = $2 AND id = $3 AND version = $4 AND deleted_at IS NULL
UNION ALL
SELECT {KEPT_COLUMNS} FROM memory_versions WHERE slot = $1 AND user_id = $2 AND id = $3 AND version = $4
"""  # noqa: S608


async def delete(connection: Connection, slot: int, user_id: str, memory_id: str, request_id: str) -> tuple[bool, bool]:
    """Empties a memory to a tombstone, once. Whether there was one; and whether this request was applied before, which
    gives it the same answer.

    Raises NotOwnedError, InvalidArgument (the request id was used for another request).
    """
    digest = requests.digest_of("delete", memory_id)
    for _ in range(_ATTEMPTS):
        try:
            async with connection.transaction():
                row = await connection.fetchrow(_DELETE, slot, user_id, memory_id, request_id, digest)
                await connection.execute(_FORGET_VERSIONS, slot, user_id, memory_id)
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != requests.UNIQUE:
                raise
            answer = await requests.find(connection, slot, user_id, request_id, digest)
            if answer is not None:
                return bool(answer["deleted"]), True
            # It was there a moment ago, and has been erased or purged since: this request is a new one.
            continue
        if row is None or not row["owned"]:
            raise NotOwnedError
        return bool(row["deleted"]), False
    raise being_removed("request id")


async def update(
    connection: Connection, identity: Identity, slot: int, request: shard_pb2.UpdateRequest
) -> tuple[pb.Memory, bool]:
    """Changes the fields that the request names, once; returns the memory, without its embedding, as it then was, and
    whether this request was applied before.

    Raises NotOwnedError, NotFound, VersionMismatch, InvalidArgument (the request id was used for another request).
    """
    key = (slot, request.memory.user_id, request.memory.id)
    try:
        async with connection.transaction():
            await ownership.hold(connection, slot)
            return await _update_held(connection, identity, key, request)
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != requests.UNIQUE:
            raise
        # Another memory's update has just taken the request id.
        raise requests.reused() from None


async def _update_held(
    connection: Connection, identity: Identity, key: tuple[int, str, str], request: shard_pb2.UpdateRequest
) -> tuple[pb.Memory, bool]:
    slot, user_id, memory_id = key
    # The row first: whoever repeats this request waits here, and then finds it applied.
    locked = await connection.fetchrow(_LOCK, *key)
    answer = await requests.find(connection, slot, user_id, request.request_id, request.digest)
    if answer is not None:
        return await _as_answered(connection, key, answer["version"]), True
    if locked is None or locked["gone"]:
        raise NotFound(f"this user has no memory {memory_id}")
    if request.HasField("expected_version") and request.expected_version != locked["version"]:
        raise VersionMismatch(f"the memory is at version {locked['version']}, not {request.expected_version}")
    memory = request.memory
    if is_past(memory):
        raise too_late()
    await connection.execute(_KEEP_VERSION, *key)
    row = await connection.fetchrow(
        _UPDATE,
        *key,
        list(request.fields),
        memory.content,
        to_json(memory.metadata),
        memory.importance,
        memory.type,
        memory.agent_id,
        memory.session_id,
        to_vector(memory.embedding, identity.precision) if memory.embedding else None,
        memory.embedding_model,
        from_microseconds(memory.expire_time.ToMicroseconds()) if memory.HasField("expire_time") else None,
    )
    assert row is not None
    answer = {"version": row["version"]}
    await requests.record(connection, slot, user_id, request.request_id, request.digest, answer)
    return to_memory(row), False


async def _as_answered(connection: Connection, key: tuple[int, str, str], version: int) -> pb.Memory:
    """What an update answered before: that version, wherever it is now; without contents once it was deleted."""
    row = await connection.fetchrow(_FIND_VERSION, *key, version)
    if row is None:
        raise NotFound(f"version {version} of the memory {key[2]} is no longer kept")
    return to_memory(row)
