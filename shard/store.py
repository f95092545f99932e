"""Storing memories, one or many: each once, in slots that this shard owns, committed by a single statement.

Ownership is the row of `owned_slots`, joined FOR SHARE inside the statement: a write that meets a fence waits for it,
re-reads the row, and then finds nothing to insert from. A plain check in the same statement would still see the state
from before the wait (docs/decisions/0003-ownership-in-the-statement.md).
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from common.errors import AlreadyExists, MemshardError
from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard.expiry import is_past, too_late
from shard.identity import Identity
from shard.ownership import NotOwnedError
from shard.refusal import being_removed
from shard.rows import COLUMNS, from_microseconds, set_timestamp, to_json, to_memory, to_vector

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
# Slots are locked, and rows inserted, in one order: two batches that share some cannot wait for each other in a ring.
_STORE_MANY = """
WITH items AS (
    SELECT * FROM unnest($1::int[], $2::text[], $3::uuid[], $4::bytea[], $5::text[], $6::text[], $7::smallint[],
                         $8::real[], $9::text[], $10::jsonb[], $11::{vector}[], $12::text[],
                         $13::timestamptz[])
    WITH ORDINALITY AS item (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                             embedding, embedding_model, expire_time, number)
), own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = ANY ($1::int[]) AND state = 'own' ORDER BY slot FOR SHARE
), stored AS (
    INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                          embedding, embedding_model, expire_time)
    SELECT slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata, embedding,
           embedding_model, expire_time
    FROM items JOIN own USING (slot) WHERE expire_time IS NULL OR expire_time > now()
    ORDER BY slot, user_id, id, number
    ON CONFLICT (slot, user_id, id) DO NOTHING
    RETURNING slot, user_id, id
)
SELECT ARRAY(SELECT slot FROM own) AS owned,
       ARRAY(SELECT ROW(slot, user_id, id) FROM stored) AS stored
"""
# The same for memories that are new, whoever asked for them. A slot whose state is just being changed is passed by: it
# would hold up all the others. What this does not store, for that or any other cause, is stored by itself.
_STORE_TOGETHER = """
WITH items AS (
    SELECT * FROM unnest($1::int[], $2::text[], $3::uuid[], $4::bytea[], $5::text[], $6::text[], $7::smallint[],
                         $8::real[], $9::text[], $10::jsonb[], $11::{vector}[], $12::text[],
                         $13::timestamptz[])
    AS item (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
             embedding, embedding_model, expire_time)
), own AS MATERIALIZED (
    SELECT slot FROM owned_slots WHERE slot = ANY ($1::int[]) AND state = 'own' ORDER BY slot FOR SHARE SKIP LOCKED
)
INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                      embedding, embedding_model, expire_time)
SELECT slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata, embedding,
       embedding_model, expire_time
FROM items JOIN own USING (slot) WHERE expire_time IS NULL OR expire_time > now()
ORDER BY slot, user_id, id
ON CONFLICT (slot, user_id, id) DO NOTHING
RETURNING slot, user_id, id, create_time, update_time, version
"""
_FIND_DIGESTS = """
SELECT memories.slot, memories.user_id, memories.id, digest, deleted_at
FROM unnest($1::int[], $2::text[], $3::uuid[]) AS item (slot, user_id, id)
JOIN memories ON (memories.slot, memories.user_id, memories.id) = (item.slot, item.user_id, item.id)
"""

# A conflicting row can vanish between the insert and the look at it only by being purged, a day old.
_ATTEMPTS = 3

_Key = tuple[int, str, str]


class Stored(NamedTuple):
    """A memory as stored, without its embedding; whether it has been deleted since; whether it was there before."""

    memory: pb.Memory
    deleted: bool
    repeated: bool


class Deleted:
    """The outcome of an item that was stored before and has been deleted since: no error, and no memory either."""


async def store(connection: Connection, identity: Identity, slot: int, memory: pb.Memory, digest: bytes) -> Stored:
    """Stores `memory` once. The same digest again is the same success.

    Raises NotOwnedError, AlreadyExists (the id has, or had within the tombstone's life, other content).
    """
    for _ in range(_ATTEMPTS):
        row = await connection.fetchrow(_STORE, slot, *_values(memory, digest, identity))
        if row is None or not row["owned"]:
            raise NotOwnedError
        if row["version"] is not None:
            return Stored(_as_stored(memory, row), deleted=False, repeated=False)
        found = await connection.fetchrow(_FIND_STORED, slot, memory.user_id, memory.id)
        if found is not None:
            return _repeated(memory, digest, found)
        if is_past(memory):
            raise too_late()
    raise being_removed("memory with this id")


async def store_many(
    connection: Connection, identity: Identity, items: Sequence[shard_pb2.StoreItem]
) -> tuple[list[MemshardError | NotOwnedError | Deleted | None], bool]:
    """Stores every item that it can, each once; what became of each, in order: None for a success. And whether any of
    them was there before.

    The same item twice is stored once; the same id with other content is AlreadyExists for whoever comes later.
    """
    outcomes: dict[int, MemshardError | NotOwnedError | Deleted | None] = {}
    left = list(range(len(items)))
    repeated = False
    for _ in range(_ATTEMPTS):
        columns = zip(*(_row(items[number], identity) for number in left), strict=True)
        statement = _STORE_MANY.format(vector=identity.vector_type)
        row = await connection.fetchrow(statement, *(list(column) for column in columns))
        assert row is not None
        owned = set(row["owned"])
        stored = {(slot, user_id, str(memory_id)) for slot, user_id, memory_id in row["stored"]}
        times = Counter(_key(items[number]) for number in left)
        in_question = []
        for number in left:
            if items[number].slot not in owned:
                outcomes[number] = NotOwnedError()
            elif (key := _key(items[number])) in stored and times[key] == 1:
                outcomes[number] = None
            else:
                in_question.append(number)
        digests = await _digests(connection, [_key(items[number]) for number in in_question])
        left = []
        for number in in_question:
            found = digests.get(_key(items[number]))
            if found is None and is_past(items[number].memory):
                outcomes[number] = too_late()
            elif found is None:
                left.append(number)
            else:
                outcomes[number] = _outcome(items[number], *found)
                repeated = True
        if not left:
            break
    outcomes.update(dict.fromkeys(left, being_removed("memory with this id")))
    return [outcomes[number] for number in range(len(items))], repeated


async def store_together(
    connection: Connection, identity: Identity, items: Sequence[shard_pb2.StoreItem]
) -> list[Stored | None]:
    """Stores those of several unrelated memories that are new, in one statement; None for each of the others."""
    columns = zip(*(_row(item, identity) for item in items), strict=True)
    statement = _STORE_TOGETHER.format(vector=identity.vector_type)
    rows = await connection.fetch(statement, *(list(column) for column in columns))
    stored = {(row["slot"], row["user_id"], str(row["id"])): row for row in rows}
    # Of two with one id it cannot be told which of them was stored.
    times = Counter(map(_key, items))
    return [
        Stored(_as_stored(item.memory, stored[key]), deleted=False, repeated=False)
        if (key := _key(item)) in stored and times[key] == 1
        else None
        for item in items
    ]


async def _digests(connection: Connection, keys: Sequence[_Key]) -> dict[_Key, tuple[bytes, datetime | None]]:
    if not keys:
        return {}
    slots, users, ids = (list(column) for column in zip(*keys, strict=True))
    rows = await connection.fetch(_FIND_DIGESTS, slots, users, ids)
    return {(row["slot"], row["user_id"], str(row["id"])): (row["digest"], row["deleted_at"]) for row in rows}


def _outcome(item: shard_pb2.StoreItem, digest: bytes, deleted_at: datetime | None) -> AlreadyExists | Deleted | None:
    """What becomes of an item whose id is taken."""
    if digest != item.digest:
        return _taken(item.memory.id, deleted_at)
    return Deleted() if deleted_at else None


def _key(item: shard_pb2.StoreItem) -> _Key:
    return item.slot, item.memory.user_id, item.memory.id


def _row(item: shard_pb2.StoreItem, identity: Identity) -> tuple[Any, ...]:
    return item.slot, *_values(item.memory, item.digest, identity)


def _values(memory: pb.Memory, digest: bytes, identity: Identity) -> tuple[Any, ...]:
    """The columns of a new row, after its slot."""
    return (
        memory.user_id,
        memory.id,
        digest,
        memory.agent_id,
        memory.session_id,
        memory.type,
        memory.importance,
        memory.content,
        to_json(memory.metadata) if memory.metadata.fields else "{}",
        to_vector(memory.embedding, identity.precision) if memory.embedding else None,
        memory.embedding_model,
        from_microseconds(memory.expire_time.ToMicroseconds()) if memory.HasField("expire_time") else None,
    )


def _as_stored(memory: pb.Memory, row: asyncpg.Record) -> pb.Memory:
    # Field by field: a copy would carry the embedding along, only to have it cleared.
    stored = pb.Memory(
        id=memory.id,
        user_id=memory.user_id,
        agent_id=memory.agent_id,
        session_id=memory.session_id,
        type=memory.type,
        content=memory.content,
        embedding_model=memory.embedding_model,
        embedding_state=pb.EMBEDDING_STATE_READY if memory.embedding else pb.EMBEDDING_STATE_PENDING,
        version=row["version"],
    )
    if memory.HasField("importance"):
        stored.importance = memory.importance
    if memory.HasField("metadata"):
        stored.metadata.CopyFrom(memory.metadata)
    if memory.HasField("expire_time"):
        stored.expire_time.CopyFrom(memory.expire_time)
    set_timestamp(stored.create_time, row["create_time"])
    set_timestamp(stored.update_time, row["update_time"])
    return stored


def _repeated(memory: pb.Memory, digest: bytes, found: asyncpg.Record) -> Stored:
    if found["digest"] != digest:
        raise _taken(memory.id, found["deleted_at"])
    if found["deleted_at"]:
        # Its content is gone for good; a late retry hears what the first attempt would have.
        return Stored(_as_stored(memory, found), deleted=True, repeated=True)
    return Stored(to_memory(found), deleted=False, repeated=True)


def _taken(memory_id: str, deleted_at: datetime | None) -> AlreadyExists:
    gone = " of a memory deleted within the last 24 hours" if deleted_at else ""
    return AlreadyExists(f"the id {memory_id} is taken by other content{gone}")
