"""Reads: one memory, a page of a listing, the nearest to an embedding. What a replica serves too.

Each statement reads ownership and rows in one snapshot, and answers for exactly the slots it was asked about: a shard
that does not own all of them says so (NotServedError) rather than answering in part.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from common.postgres import Connection
from common.probe_user import PREFIX
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard.filters import compile_filter
from shard.identity import Identity
from shard.rows import (
    COLUMNS,
    KEPT_COLUMNS,
    fill_memory,
    from_microseconds,
    to_memory,
    to_microseconds,
    to_vector,
)
from shard.schema import words_of

_LIVE = "deleted_at IS NULL AND (expire_time IS NULL OR expire_time > now())"
_SERVED = "state IN ('own', 'fenced')"

# What is found is left-joined to what is owned: nothing found is one row of nulls, nothing owned no row, or too few.
_IN_ONE_SLOT = """
SELECT 1::bigint AS served, {beside}, found.* FROM owned_slots
LEFT JOIN LATERAL ({found}) AS found ON true
WHERE owned_slots.slot = $1 AND {served}
"""
_IN_MANY_SLOTS = """
WITH asked AS MATERIALIZED (
    SELECT range_agg(int4range(first, last, '[]')) AS slots FROM unnest($1::int[], $2::int[]) AS ranges (first, last)
), owned AS (
    SELECT count(*) AS served FROM unnest($1::int[], $2::int[]) AS ranges (first, last)
    JOIN owned_slots ON owned_slots.slot BETWEEN ranges.first AND ranges.last WHERE {served}
)
SELECT (SELECT served FROM owned) AS served, {beside}, found.* FROM (VALUES (1)) AS one
LEFT JOIN LATERAL ({found}) AS found ON true
"""
_SIMILARITY = "(1 - (embedding <=> {vector}))::real"
_UNEMBEDDED = f"(SELECT count(*) FROM memories WHERE {{whose}} AND embedding IS NULL AND {_LIVE})"  # noqa: S608
# Any word of the query, as PostgreSQL's parser and dictionaries see them; no word at all matches nothing.
_ANY_WORD = """(SELECT string_agg(quote_literal(lexeme), ' | ')::tsquery
                FROM (SELECT lexeme FROM unnest(tsvector_to_array(to_tsvector({language}::regconfig, {text})))
                      AS lexeme LIMIT {most}) AS lexemes)"""
# Ranking looks at every word of the query for every memory that matches one of them.
_MAX_QUERY_WORDS = 256
# Divided by 1 + log(length): a long memory is not better for being long.
_TEXT_RANK_NORMALISATION = 1

# Rows fetched at once for a listing, so that a page of large memories does not bring a thousand of them to be dropped.
_LIST_CHUNK = 100
# Later than every memory, for a listing from its beginning.
_NEWEST = (from_microseconds(253_402_300_799_000_000), b"\xff" * 16)  # 9999-12-31T23:59:59Z

Ranges = Sequence[shard_pb2.SlotRange]


class NotServedError(Exception):
    """Some slot that was asked for is not this shard's to read."""


async def get(
    connection: Connection, ranges: Ranges, memory_id: str, user_id: str, *, include_embedding: bool
) -> list[shard_pb2.FoundMemory]:
    """The memories with an id: at most one of a user, at most two of anybody (enough to know it is ambiguous)."""
    question = _Question(ranges, user_id)
    columns = _columns(include_embedding)
    rows = await question.ask(
        connection,
        f"SELECT slot, {columns} FROM memories "  # noqa: S608  # Constants and parameters' numbers, here as below.
        f"WHERE {question.whose} AND id = {question.add(memory_id)} AND {_LIVE} ORDER BY user_id LIMIT 2",
    )
    return [
        shard_pb2.FoundMemory(memory=to_memory(row, include_embedding=include_embedding), slot=row["slot"])
        for row in rows
    ]


async def list_page(connection: Connection, request: shard_pb2.ListRequest, page_bytes: int) -> shard_pb2.ListResponse:
    """One page of a user's memories, newest first; it ends early after `page_bytes`."""
    after = _NEWEST
    if request.HasField("after"):
        after = (from_microseconds(request.after.create_time_us), request.after.id)
    page = shard_pb2.ListResponse()
    size = 0
    while True:
        # One more than the page needs tells whether there is a next page.
        wanted = min(request.page_size - len(page.memories) + 1, _LIST_CHUNK)
        rows = await _list_chunk(connection, request, after, wanted)
        for row in rows:
            if len(page.memories) == request.page_size or size > page_bytes:
                page.next.CopyFrom(shard_pb2.ListPosition(create_time_us=to_microseconds(after[0]), id=after[1]))
                return page
            memory = page.memories.add()
            fill_memory(memory, row, include_embedding=request.include_embedding)
            size += memory.ByteSize()
            after = (row["create_time"], row["id"].bytes)
        if len(rows) < wanted:
            return page


async def list_versions(
    connection: Connection, request: shard_pb2.ListVersionsRequest, page_bytes: int
) -> shard_pb2.ListVersionsResponse:
    """The versions of a memory, newest first: what it is now, if it is, and what is kept of before.

    Of an expired memory there is nothing; of a deleted one, the versions without their contents, its last among them.
    What an erasure left of an earlier memory with this id is not shown: its numbers are not below this one's, or they
    were replaced.
    """
    question = _Question(request.route.ranges, request.user_id)
    key = f"{question.whose} AND id = {question.add(request.id)}"
    before = question.add(request.before_version)
    rows = await question.ask(
        connection,
        f"SELECT * FROM (SELECT {COLUMNS} FROM memories WHERE {key} AND {_LIVE} UNION ALL "  # noqa: S608
        f"SELECT {KEPT_COLUMNS} FROM memory_versions AS kept WHERE {key} AND EXISTS "
        f"(SELECT FROM memories WHERE {key} AND kept.version < version + (deleted_at IS NOT NULL)::int "
        f"AND (expire_time IS NULL OR expire_time > coalesce(deleted_at, now())))) AS versions "
        f"WHERE ({before} = 0 OR version < {before}) ORDER BY version DESC LIMIT {question.add(request.page_size + 1)}",
    )
    page = shard_pb2.ListVersionsResponse()
    for row in rows[: request.page_size]:
        fill_memory(page.versions.add(), row)
        if page.ByteSize() > page_bytes:
            break
    page.more = len(rows) > len(page.versions)
    return page


async def search(
    connection: Connection, identity: Identity, request: shard_pb2.SearchRequest
) -> shard_pb2.SearchResponse:
    """The k best memories, best first; ties by id, then user. By cosine similarity, or by how well words match.

    Exact by construction: no index has the order of an expression, so the ORDER BY sees every row that is asked for.
    """
    question = _Question(request.route.ranges, request.user_id)
    if request.embedding:
        vector = question.add(to_vector(request.embedding, identity.precision))
        score, matches = _SIMILARITY.format(vector=vector), "embedding IS NOT NULL"
    else:
        words = _ANY_WORD.format(
            language=question.add(identity.text_language),
            text=words_of(f"{question.add(request.words)}::text"),
            most=_MAX_QUERY_WORDS,
        )
        score, matches = f"ts_rank_cd(words, {words}, {_TEXT_RANK_NORMALISATION})", f"words @@ {words}"
    conditions = [question.whose, matches, _LIVE, question.filter(request.filter)]
    if request.HasField("min_score"):
        conditions.append(f"{score} >= {question.add(request.min_score)}::real")
    rows, unembedded = await question.ask_beside(
        connection,
        f"SELECT {_columns(request.include_embedding)}, {score} AS score FROM memories "  # noqa: S608
        f"WHERE {' AND '.join(conditions)} ORDER BY score DESC, id, user_id LIMIT {question.add(request.k)}",
        _UNEMBEDDED.format(whose=question.whose),
    )
    return _found(request, rows, unembedded)


async def search_index(
    connection: Connection,
    identity: Identity,
    request: shard_pb2.SearchRequest,
    key: int | None,
    *,
    candidates: int,
    effort: int,
) -> shard_pb2.SearchResponse | None:
    """The k best of the `candidates` nearest by the user's own index, with `key` in its predicate, or with None by that
    of all memories; None when fewer than k pass the filter, which does not mean that there are no more.

    Without the index the answer is the same, and takes as long as an exact one.
    """
    question = _Question(request.route.ranges, request.user_id)
    vector = question.add(to_vector(request.embedding, identity.precision))
    whose = "" if key is None else f"{question.add(request.user_id)}, {question.add(key)}, "
    function = "shared_index_nearest" if key is None else "own_index_nearest"
    nearest = f"{function}({whose}{vector}, {question.add(candidates)}, {question.add(effort)})"
    rows, unembedded = await question.ask_beside(
        connection,
        f"SELECT {_columns(request.include_embedding)}, {_SIMILARITY.format(vector=vector)} AS score "  # noqa: S608
        f"FROM {nearest} AS memories WHERE {question.whose} AND {question.filter(request.filter)} "
        f"ORDER BY score DESC, id, user_id LIMIT {question.add(request.k)}",
        _UNEMBEDDED.format(whose=question.whose),
    )
    if len(rows) < request.k:
        return None
    if request.HasField("min_score"):
        rows = [row for row in rows if row["score"] >= request.min_score]
    return _found(request, rows, unembedded)


def _found(
    request: shard_pb2.SearchRequest, rows: Sequence[asyncpg.Record], unembedded: int
) -> shard_pb2.SearchResponse:
    response = shard_pb2.SearchResponse(unembedded=unembedded)
    for row in rows:
        result = response.results.add()
        fill_memory(result.memory, row, include_embedding=request.include_embedding)
        result.score = row["score"]
    return response


def slot_count(ranges: Ranges) -> int:
    """How many slots there are in `ranges`."""
    return sum(asked.last - asked.first + 1 for asked in ranges)


async def _list_chunk(
    connection: Connection, request: shard_pb2.ListRequest, after: tuple[datetime, bytes], count: int
) -> list[asyncpg.Record]:
    question = _Question(request.route.ranges, request.user_id)
    position = f"({question.add(after[0])}, {question.add(UUID(bytes=after[1]))})"
    return await question.ask(
        connection,
        f"SELECT {_columns(request.include_embedding)} FROM memories "  # noqa: S608
        f"WHERE {question.whose} AND (create_time, id) < {position} AND {_LIVE} AND {question.filter(request.filter)} "
        f"ORDER BY create_time DESC, id DESC LIMIT {question.add(count)}",
    )


class _Question:
    """A statement in the making: its parameters, and the slots and the user that it is about."""

    def __init__(self, ranges: Ranges, user_id: str) -> None:
        self._slots = slot_count(ranges)
        self._parameters: list[Any] = []
        if self._slots == 1:
            self._frame = _IN_ONE_SLOT
            self.add(ranges[0].first)
            self.whose = "slot = owned_slots.slot"
        else:
            self._frame = _IN_MANY_SLOTS
            self.add([asked.first for asked in ranges])
            self.add([asked.last for asked in ranges])
            # What was asked for, not what of it is served: these are the same where there is an answer at all, and a
            # join with thousands of slots, which the planner takes for a handful, compares each row with each of them.
            # The sum keeps it from going through the rows slot by slot. Words, ids and users have indexes of their own.
            self.whose = "slot + 0 <@ (SELECT slots FROM asked)"
        if user_id:
            self.whose += f" AND user_id = {self.add(user_id)}"
        else:
            self.whose += f" AND NOT starts_with(user_id, {self.add(PREFIX)})"

    def add(self, value: Any) -> str:
        """A parameter with this value; returns its number as SQL."""
        self._parameters.append(value)
        return f"${len(self._parameters)}"

    def filter(self, wanted: pb.Filter) -> str:
        """A condition for a filter that the router has checked."""
        if wanted.WhichOneof("kind") is None:
            return "true"
        compiled = compile_filter(wanted, len(self._parameters) + 1)
        self._parameters.extend(compiled.parameters)
        return compiled.sql

    async def ask(self, connection: Connection, found: str) -> list[asyncpg.Record]:
        """The rows of `found`, which selects an `id`. Raises NotServedError unless all slots asked for are served."""
        rows, _ = await self.ask_beside(connection, found, "NULL")
        return rows

    async def ask_beside(self, connection: Connection, found: str, beside: str) -> tuple[list[asyncpg.Record], Any]:
        """The rows of `found`, and the value of the expression `beside`, which may speak of the slots, in one snapshot.

        Raises NotServedError unless all slots asked for are served.
        """
        statement = self._frame.format(found=found, served=_SERVED, beside=f"{beside} AS beside")
        rows = await connection.fetch(statement, *self._parameters)
        if not rows or rows[0]["served"] != self._slots:
            raise NotServedError
        return [row for row in rows if row["id"] is not None], rows[0]["beside"]


def _columns(include_embedding: bool) -> str:
    return f"{COLUMNS}, embedding" if include_embedding else COLUMNS
