"""Reads: one memory, a page of a listing, the nearest to an embedding. What a replica serves too.

Each statement reads ownership and rows in one snapshot, and answers for exactly the slots it was asked about: a shard
that does not own all of them says so (NotServedError) rather than answering in part.
"""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard.identity import Identity
from shard.rows import COLUMNS, from_microseconds, to_memory, to_microseconds, to_vector

_LIVE = "deleted_at IS NULL AND (expire_time IS NULL OR expire_time > now())"
_SERVED = "state IN ('own', 'fenced')"

# $1 and $2: first and last slot of each range asked for.
_OWNED = f"""
WITH owned AS MATERIALIZED (
    SELECT owned_slots.slot FROM unnest($1::int[], $2::int[]) AS asked (first, last)
    JOIN owned_slots ON owned_slots.slot BETWEEN asked.first AND asked.last WHERE {_SERVED}
)
"""  # noqa: S608  # Constants of this module.

_GET = f"""
SELECT 1::bigint AS served, found.* FROM owned_slots
LEFT JOIN LATERAL (
    SELECT slot, {COLUMNS}, CASE WHEN $4 THEN embedding END AS embedding FROM memories
    WHERE slot = owned_slots.slot AND user_id = $2 AND id = $3 AND {_LIVE}
) AS found ON true
WHERE owned_slots.slot = $1 AND {_SERVED}
"""  # noqa: S608
# Two rows are enough to know that the id is ambiguous.
_FIND = f"""
{_OWNED}
SELECT (SELECT count(*) FROM owned) AS served, found.* FROM (VALUES (1)) AS one
LEFT JOIN LATERAL (
    SELECT slot, {COLUMNS}, CASE WHEN $4 THEN embedding END AS embedding FROM memories
    WHERE id = $3 AND slot IN (SELECT slot FROM owned) AND {_LIVE} ORDER BY user_id LIMIT 2
) AS found ON true
"""  # noqa: S608
_LIST = f"""
SELECT 1::bigint AS served, found.* FROM owned_slots
LEFT JOIN LATERAL (
    SELECT {COLUMNS}, CASE WHEN $6 THEN embedding END AS embedding FROM memories
    WHERE slot = owned_slots.slot AND user_id = $2 AND (create_time, id) < ($3, $4) AND {_LIVE}
    ORDER BY create_time DESC, id DESC LIMIT $5
) AS found ON true
WHERE owned_slots.slot = $1 AND {_SERVED}
"""  # noqa: S608
# Exact by construction: no index holds embeddings, so the ORDER BY sees every row of the user.
_SEARCH_USER = f"""
SELECT 1::bigint AS served, found.* FROM owned_slots
LEFT JOIN LATERAL (
    SELECT {COLUMNS}, CASE WHEN $6 THEN embedding END AS embedding, (1 - (embedding <=> $3))::real AS score
    FROM memories
    WHERE slot = owned_slots.slot AND user_id = $2 AND embedding IS NOT NULL AND {_LIVE}
        AND ($5::real IS NULL OR (1 - (embedding <=> $3))::real >= $5)
    ORDER BY score DESC, id LIMIT $4
) AS found ON true
WHERE owned_slots.slot = $1 AND {_SERVED}
"""  # noqa: S608
_SEARCH_ALL = f"""
{_OWNED}
SELECT (SELECT count(*) FROM owned) AS served, found.* FROM (VALUES (1)) AS one
LEFT JOIN LATERAL (
    SELECT {COLUMNS}, CASE WHEN $6 THEN embedding END AS embedding, (1 - (embedding <=> $3))::real AS score
    FROM memories
    WHERE slot IN (SELECT slot FROM owned) AND embedding IS NOT NULL AND {_LIVE}
        AND ($5::real IS NULL OR (1 - (embedding <=> $3))::real >= $5)
    ORDER BY score DESC, id, user_id LIMIT $4
) AS found ON true
"""  # noqa: S608

# Rows fetched at once for a listing, so that a page of large memories does not bring a thousand of them to be dropped.
_LIST_CHUNK = 100
# Sorts before nothing: every (create_time, id) is less than this.
_NEWEST = (from_microseconds(253_402_300_799_000_000), b"\xff" * 16)  # 9999-12-31T23:59:59Z

Ranges = Sequence[shard_pb2.SlotRange]


class NotServedError(Exception):
    """Some slot that was asked for is not this shard's to read."""


async def get(
    connection: Connection, ranges: Ranges, memory_id: str, user_id: str, *, include_embedding: bool
) -> list[shard_pb2.FoundMemory]:
    """The memories with an id: at most one of a user (`ranges` is one slot then), at most two of anybody."""
    if user_id:
        rows = await connection.fetch(_GET, _one_slot(ranges), user_id, memory_id, include_embedding)
        found = _served(rows, 1)
    else:
        rows = await connection.fetch(_FIND, *_bounds(ranges), memory_id, include_embedding)
        found = _served(rows, _count(ranges))
    return [
        shard_pb2.FoundMemory(memory=to_memory(row, include_embedding=include_embedding), slot=row["slot"])
        for row in found
    ]


async def list_page(connection: Connection, request: shard_pb2.ListRequest, page_bytes: int) -> shard_pb2.ListResponse:
    """One page of a user's memories, newest first; it ends early after `page_bytes`."""
    slot = _one_slot(request.route.ranges)
    after = _NEWEST
    if request.HasField("after"):
        after = (from_microseconds(request.after.create_time_us), request.after.id)
    page = shard_pb2.ListResponse()
    size = 0
    while True:
        # One more than the page needs tells whether there is a next page.
        wanted = min(request.page_size - len(page.memories) + 1, _LIST_CHUNK)
        rows = _served(
            await connection.fetch(
                _LIST, slot, request.user_id, after[0], UUID(bytes=after[1]), wanted, request.include_embedding
            ),
            1,
        )
        for row in rows:
            if len(page.memories) == request.page_size or size > page_bytes:
                page.next.CopyFrom(shard_pb2.ListPosition(create_time_us=to_microseconds(after[0]), id=after[1]))
                return page
            memory = to_memory(row, include_embedding=request.include_embedding)
            page.memories.append(memory)
            size += memory.ByteSize()
            after = (row["create_time"], row["id"].bytes)
        if len(rows) < wanted:
            return page


async def search(
    connection: Connection, identity: Identity, request: shard_pb2.SearchRequest
) -> shard_pb2.SearchResponse:
    """The k nearest memories by cosine similarity, best first; ties by id, then user."""
    arguments = (
        request.user_id,
        to_vector(request.embedding, identity.precision),
        request.k,
        request.min_score if request.HasField("min_score") else None,
        request.include_embedding,
    )
    ranges = request.route.ranges
    if request.user_id:
        rows = _served(await connection.fetch(_SEARCH_USER, _one_slot(ranges), *arguments), 1)
    else:
        rows = _served(await connection.fetch(_SEARCH_ALL, *_bounds(ranges), *arguments[1:]), _count(ranges))
    return shard_pb2.SearchResponse(
        results=[
            pb.ScoredMemory(memory=to_memory(row, include_embedding=request.include_embedding), score=row["score"])
            for row in rows
        ]
    )


def _served(rows: list[asyncpg.Record], slots: int) -> list[asyncpg.Record]:
    """The rows found, if all `slots` that were asked for are served here. Raises NotServedError.

    Statements left-join what they find to what they own: nothing found is one row of nulls, nothing owned no row.
    """
    if not rows or rows[0]["served"] != slots:
        raise NotServedError
    return [row for row in rows if row["id"] is not None]


def _one_slot(ranges: Ranges) -> int:
    return ranges[0].first


def _bounds(ranges: Ranges) -> tuple[list[int], list[int]]:
    return [asked.first for asked in ranges], [asked.last for asked in ranges]


def _count(ranges: Ranges) -> int:
    return sum(asked.last - asked.first + 1 for asked in ranges)
