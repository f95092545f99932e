"""Filters in PostgreSQL: the SQL gives what the model of the tests gives, for any filter and any memory."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, TypeAlias

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf import json_format
from hypothesis import HealthCheck, event, given, settings

from common import catalog
from common.migrations import migrate
from local.cluster import Plan
from local.record import load_record, load_secrets
from memshard.v1 import memory_pb2 as pb
from router import filters as router_filters
from shard import schema
from shard.filters import compile_filter
from shard.rows import to_timestamp
from tests.support.databases import fresh_layout, in_a_process
from tests.support.filter_cases import Case, cases
from tests.support.filter_model import ABSENT, all_of, any_of, compare, matches, negation
from tests.support.wire import database

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

EXAMPLES = 500

# The columns that filters know, of the types that the shard's own schema gives them; it hides the real table.
_TABLE = """
CREATE TEMPORARY TABLE memories AS
SELECT 0 AS number, agent_id, session_id, type, importance, metadata, create_time, update_time, expire_time
FROM memories LIMIT 0
"""
_INSERT = "INSERT INTO memories VALUES ($1, $2, $3, $4, $5, $6::jsonb, $7, $8, $9)"

NOON = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)
HOSTILE = "x' OR true --"


@pytest_asyncio.fixture(scope="module")
async def memories() -> AsyncIterator[Database]:
    """A shard's database with the shard's own schema; its `memories` is a table of this connection only."""
    with fresh_layout() as layout:
        async with in_a_process(layout):
            plan = Plan(layout, load_record(layout), load_secrets(layout), ())
            async with database(plan.catalog_server().app_dsn(plan.secrets)) as reader:
                cluster = await catalog.read_cluster(reader)
            async with database(plan.shard_server("shard-0").owner_dsn(plan.secrets)) as connection:
                await migrate(connection, schema.migrations(cluster))
                await connection.execute(_TABLE)
                yield connection


async def found_by_sql(connection: Database, filter: pb.Filter, tried: list[pb.Memory]) -> list[bool | None]:
    """For each memory, whether the filter's SQL finds it."""
    return [answers[0] for answers in await answers_of_sql(connection, [filter], tried)]


async def answers_of_sql(
    connection: Database, filters: list[pb.Filter], tried: list[pb.Memory]
) -> list[list[bool | None]]:
    """For each memory, what the SQL of each filter says."""
    parameters: list[Any] = [0, len(tried)]
    expressions: list[str] = []
    for filter in filters:
        router_filters.check(filter)
        compiled = compile_filter(filter, len(parameters) + 1)
        expressions.append(compiled.sql)
        parameters += compiled.parameters
    await connection.execute("DELETE FROM memories")
    await connection.executemany(_INSERT, [_row(number, memory) for number, memory in enumerate(tried)])
    rows = await connection.fetch(
        f"SELECT ARRAY[{', '.join(expressions)}] AS answers FROM memories WHERE number BETWEEN $1 AND $2"
        " ORDER BY number",
        *parameters,
    )
    return [row["answers"] for row in rows]


def _row(number: int, memory: pb.Memory) -> tuple[Any, ...]:
    return (
        number,
        memory.agent_id,
        memory.session_id,
        memory.type,
        memory.importance,
        json.dumps(json_format.MessageToDict(memory.metadata)),
        *(
            getattr(memory, name).ToDatetime(UTC) if memory.HasField(name) else None
            for name in ("create_time", "update_time", "expire_time")
        ),
    )


@pytest.mark.timeout(400)  # A failure is made smaller for up to five minutes.
# Too slow and too much are no faults of examples that are large on purpose.
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=cases())
async def test_sql_finds_what_the_model_finds(memories: Database, case: Case) -> None:
    expected = [[matches(filter, memory) for filter in case.filters] for memory in case.memories]
    assert await answers_of_sql(memories, case.filters, case.memories) == expected
    # What `--hypothesis-show-statistics` counts: every operator should be seen to match and not to.
    for answers in expected:
        for filter, answer in zip(case.filters[1:], answers[1:], strict=True):
            event(f"{pb.Operator.Name(filter.comparison.operator)} {answer}")


# What: a filter, a memory's metadata, whether it matches.
_METADATA: list[tuple[str, pb.Filter, dict[str, Any], bool]] = [
    ("numbers are not ordered as text", compare("metadata.n", "LT", 10), {"n": 9}, True),
    ("nor are they the other way", compare("metadata.n", "GT", 10), {"n": 9}, False),
    ("strings are ordered as text", compare("metadata.n", "GT", "10"), {"n": "9"}, True),
    ("strings are ordered by bytes: capitals first", compare("metadata.s", "LT", "a"), {"s": "Z"}, True),
    ("and accents after z", compare("metadata.s", "GT", "z"), {"s": "ä"}, True),
    ("and by UTF-8, not UTF-16", compare("metadata.s", "GT", "\uffff"), {"s": "\U0001f600"}, True),
    ("a whole number is its float", compare("metadata.n", "EQ", 1.0), {"n": 1}, True),
    ("minus zero is zero", compare("metadata.n", "EQ", -0.0), {"n": 0}, True),
    ("doubles that differ in the last bit differ", compare("metadata.n", "EQ", 0.1), {"n": 0.1 + 2**-56}, False),
    ("the largest double", compare("metadata.n", "EQ", 1.7976931348623157e308), {"n": 1.7976931348623157e308}, True),
    ("the smallest double", compare("metadata.n", "GT", 0), {"n": 5e-324}, True),
    ("a string of digits is no number", compare("metadata.n", "EQ", 1), {"n": "1"}, False),
    ("nor the other way", compare("metadata.n", "EQ", "1"), {"n": 1}, False),
    ("nor in an ordering", compare("metadata.n", "GT", 0), {"n": "1"}, False),
    ("nor among strings", compare("metadata.n", "GT", "1"), {"n": 2}, False),
    ("nor in a list", compare("metadata.n", "IN", ["1"]), {"n": 1}, False),
    ("true is not 1", compare("metadata.b", "EQ", 1), {"b": True}, False),
    ("true is not its name", compare("metadata.b", "EQ", "true"), {"b": True}, False),
    ("true is true", compare("metadata.b", "IN", [False, True]), {"b": True}, True),
    ("another type is another value", compare("metadata.n", "NE", 1), {"n": "1"}, True),
    ("a list is not its only element", compare("metadata.n", "EQ", 1), {"n": [1]}, False),
    ("an element is not its list", compare("metadata.n", "EQ", [1]), {"n": 1}, False),
    ("lists are equal in their order", compare("metadata.l", "EQ", [1, "a", None]), {"l": [1, "a", None]}, True),
    ("and only so", compare("metadata.l", "EQ", [1, 2]), {"l": [2, 1]}, False),
    ("and with all their elements", compare("metadata.l", "EQ", [1]), {"l": [1, 1]}, False),
    ("empty lists are equal", compare("metadata.l", "EQ", []), {"l": []}, True),
    ("an empty list is no empty object", compare("metadata.l", "EQ", []), {"l": {}}, False),
    ("objects are equal in any order", compare("metadata.o", "EQ", {"a": 1, "b": 2}), {"o": {"b": 2, "a": 1.0}}, True),
    ("a part of an object is not it", compare("metadata.o", "EQ", {"a": 1}), {"o": {"a": 1, "b": 2}}, False),
    ("a path goes through objects", compare("metadata.a.b.c", "EQ", 1), {"a": {"b": {"c": 1}}}, True),
    ("but not into lists", compare("metadata.a.0", "EXISTS"), {"a": [1]}, False),
    ("nor from their end", compare("metadata.a.-1", "EXISTS"), {"a": [1]}, False),
    ("a digit may be a key", compare("metadata.a.0", "EQ", 1), {"a": {"0": 1}}, True),
    ("nor into the objects in them", compare("metadata.a.b", "EXISTS"), {"a": [{"b": 1}]}, False),
    ("nor into strings", compare("metadata.a.b", "EXISTS"), {"a": '{"b": 1}'}, False),
    ("a key with a dot is no path", compare("metadata.a.b", "EXISTS"), {"a.b": 1}, False),
    ("keys keep their case", compare("metadata.A", "EXISTS"), {"a": 1}, False),
    ("and their Unicode form", compare("metadata.ä", "EXISTS"), {"a\u0308": 1}, False),
    ("a missing field is not equal", compare("metadata.a", "EQ", 1), {}, False),
    ("nor null", compare("metadata.a", "EQ", None), {}, False),
    ("nor less", compare("metadata.a", "LT", 1), {}, False),
    ("nor in a list", compare("metadata.a", "IN", [1]), {}, False),
    ("nor does it contain", compare("metadata.a", "CONTAINS", ""), {}, False),
    ("it is other", compare("metadata.a", "NE", 1), {}, True),
    ("even than null", compare("metadata.a", "NE", None), {}, True),
    ("and not in a list", compare("metadata.a", "NOT_IN", [1]), {}, True),
    ("and does not exist", compare("metadata.a", "EXISTS", False), {}, True),
    ("existence may go without saying", compare("metadata.a", "EXISTS", ABSENT), {"a": False}, True),
    ("null is there", compare("metadata.a", "EXISTS", True), {"a": None}, True),
    ("null is null", compare("metadata.a", "EQ", None), {"a": None}, True),
    ("null is not zero", compare("metadata.a", "EQ", 0), {"a": None}, False),
    ("null is not less", compare("metadata.a", "LT", 1), {"a": None}, False),
    ("what holds of nothing missing, its negation does", negation(compare("metadata.a", "GT", 1)), {}, True),
    ("and of another type", negation(compare("metadata.a", "GT", 1)), {"a": "2"}, True),
    ("twice negated is as before", negation(negation(compare("metadata.a", "GT", 1))), {}, False),
    ("negation of a list of conditions", negation(any_of(compare("metadata.a", "EQ", 1))), {}, True),
    ("a part of a string", compare("metadata.s", "CONTAINS", "b%c"), {"s": "ab%cd"}, True),
    ("a percent sign is no wildcard", compare("metadata.s", "CONTAINS", "b%c"), {"s": "abbcd"}, False),
    ("nor is an underscore", compare("metadata.s", "CONTAINS", "a_c"), {"s": "abc"}, False),
    ("nor in an equality", compare("metadata.s", "EQ", "%"), {"s": "abc"}, False),
    ("a backslash is a backslash", compare("metadata.s", "CONTAINS", "\\"), {"s": "a\\b"}, True),
    ("case matters", compare("metadata.s", "CONTAINS", "B"), {"s": "abc"}, False),
    ("nothing is in everything", compare("metadata.s", "CONTAINS", ""), {"s": ""}, True),
    ("a number's digits are no string", compare("metadata.n", "CONTAINS", "2"), {"n": 123}, False),
    ("a string in a list", compare("metadata.l", "CONTAINS", "a"), {"l": ["b", "a"]}, True),
    ("but not a part of one", compare("metadata.l", "CONTAINS", "a"), {"l": ["ab"]}, False),
    ("a number in a list", compare("metadata.l", "CONTAINS", 1), {"l": ["1", 1.0]}, True),
    ("a number is not its digits", compare("metadata.l", "CONTAINS", 1), {"l": ["1"]}, False),
    ("nor the other way", compare("metadata.l", "CONTAINS", "1"), {"l": [1]}, False),
    ("a number does not contain itself", compare("metadata.n", "CONTAINS", 1), {"n": 1}, False),
    ("a boolean in a list", compare("metadata.l", "CONTAINS", False), {"l": [0, False]}, True),
    ("but not deeper", compare("metadata.l", "CONTAINS", 1), {"l": [[1]]}, False),
    ("a key is no element", compare("metadata.o", "CONTAINS", "a"), {"o": {"a": 1}}, False),
    ("SQL in a path is a key", compare(f"metadata.{HOSTILE}", "EQ", 1), {"a": 1}, False),
    ("that may be there", compare(f"metadata.{HOSTILE}", "EQ", 1), {HOSTILE: 1}, True),
    ("an array's text in a path is a key", compare("metadata.{a,b}", "EXISTS"), {"a": {"b": 1}}, False),
    ("a parameter in a path is a key", compare("metadata.$1", "EQ", "$1"), {"$1": "$1"}, True),
    ("SQL in a value is a string", compare("metadata.a", "IN", [HOSTILE, "'"]), {"a": "'"}, True),
    ("in a list too", compare("metadata.a", "CONTAINS", HOSTILE), {"a": f"({HOSTILE})"}, True),
    ("JSON in a value is a string", compare("metadata.a", "EQ", '"} OR true'), {"a": 1}, False),
    ("an escape in a value is a string", compare("metadata.a", "EQ", "\\u0041"), {"a": "A"}, False),
]

# What: a filter, a memory's fields, whether it matches.
_COLUMNS: list[tuple[str, pb.Filter, dict[str, Any], bool]] = [
    ("an agent", compare("agent_id", "EQ", "a"), {"agent_id": "a"}, True),
    ("no agent is missing", compare("agent_id", "EXISTS", True), {}, False),
    ("and not the empty one", compare("agent_id", "EQ", ""), {}, False),
    ("and contains nothing", compare("agent_id", "CONTAINS", ""), {}, False),
    ("and is not less", compare("agent_id", "LT", "a"), {}, False),
    ("and is another", compare("agent_id", "NE", "a"), {}, True),
    ("even than the empty one", compare("agent_id", "NOT_IN", [""]), {}, True),
    ("a wildcard is no agent", compare("session_id", "CONTAINS", "s_%"), {"session_id": "session"}, False),
    ("a part of a session", compare("session_id", "CONTAINS", "ess"), {"session_id": "session"}, True),
    ("SQL is a session", compare("session_id", "EQ", HOSTILE), {"session_id": "session"}, False),
    ("agents are ordered by bytes", compare("agent_id", "LT", "a"), {"agent_id": "Z"}, True),
    ("a type by its short name", compare("type", "EQ", "WORKING"), {"type": pb.MEMORY_TYPE_WORKING}, True),
    ("or its long one", compare("type", "IN", ["MEMORY_TYPE_WORKING", "SEMANTIC"]), {"type": 4}, True),
    ("another type", compare("type", "NE", "WORKING"), {"type": pb.MEMORY_TYPE_WORKING}, False),
    ("a type is always there", compare("type", "EXISTS", False), {"type": pb.MEMORY_TYPE_WORKING}, False),
    ("importance is a single", compare("importance", "EQ", 0.7), {"importance": 0.7}, True),
    ("so 0.7 is not above 0.7", compare("importance", "GT", 0.7), {"importance": 0.7}, False),
    ("nor below it", compare("importance", "LT", 0.7), {"importance": 0.7}, False),
    ("in a list too", compare("importance", "IN", [0.1, 0.7]), {"importance": 0.7}, True),
    ("beyond single precision", compare("importance", "LT", 1e300), {"importance": 1.0}, True),
    ("on the other side", compare("importance", "GT", -1e300), {"importance": 0.0}, True),
    ("below single precision", compare("importance", "EQ", 1e-300), {"importance": 0.0}, True),
    ("a time", compare("create_time", "EQ", "2026-07-01T12:30:15.123456Z"), {}, True),
    ("a time elsewhere", compare("create_time", "IN", ["2026-07-01T14:00:15.123456+01:30"]), {}, True),
    ("a time is cut to the microsecond", compare("create_time", "EQ", "2026-07-01T12:30:15.123456999Z"), {}, True),
    ("a microsecond earlier", compare("update_time", "GT", "2026-07-01T12:30:15.123455Z"), {}, True),
    ("a microsecond later", compare("update_time", "GTE", "2026-07-01T12:30:15.123457Z"), {}, False),
    ("the first moment", compare("create_time", "GTE", "0001-01-01T00:00:00Z"), {}, True),
    ("the last moment", compare("create_time", "LTE", "9999-12-31T23:59:59.999999Z"), {}, True),
    ("no expiry is missing", compare("expire_time", "EXISTS", False), {}, True),
    ("and not late", compare("expire_time", "GT", "2026-07-01T00:00:00Z"), {}, False),
    ("and never one of these", compare("expire_time", "NOT_IN", ["2026-07-01T00:00:00Z"]), {}, True),
    ("an expiry", compare("expire_time", "LT", "2026-07-02T00:00:00Z"), {"expire_time": to_timestamp(NOON)}, True),
    ("all of several", all_of(compare("type", "EXISTS"), compare("agent_id", "EXISTS")), {"agent_id": "a"}, True),
    ("not all", all_of(compare("type", "EXISTS"), compare("agent_id", "EXISTS")), {}, False),
    ("any of several", any_of(compare("agent_id", "EXISTS"), compare("type", "EXISTS")), {}, True),
    ("none", any_of(compare("agent_id", "EXISTS"), compare("session_id", "EXISTS")), {}, False),
]


@pytest.mark.parametrize(("filter", "metadata", "expected"), [pytest.param(*e[1:], id=e[0]) for e in _METADATA])
async def test_metadata(memories: Database, filter: pb.Filter, metadata: dict[str, Any], expected: bool) -> None:
    memory = _memory()
    memory.metadata.update(metadata)
    assert matches(filter, memory) is expected
    assert await found_by_sql(memories, filter, [memory]) == [expected]


@pytest.mark.parametrize(("filter", "fields", "expected"), [pytest.param(*e[1:], id=e[0]) for e in _COLUMNS])
async def test_columns(memories: Database, filter: pb.Filter, fields: dict[str, Any], expected: bool) -> None:
    memory = _memory(**fields)
    assert matches(filter, memory) is expected
    assert await found_by_sql(memories, filter, [memory]) == [expected]


async def test_the_largest_filter_is_answered(memories: Database) -> None:
    keys = ".".join(["k" * router_filters.MAX_PATH_PART_BYTES] * router_filters.MAX_PATH_PARTS)
    items = [f"{number:1000}" for number in range(router_filters.MAX_LIST_ITEMS)]
    several = [compare(f"metadata.{keys}", "NOT_IN", items)] * router_filters.MAX_COMPARISONS
    assert await found_by_sql(memories, all_of(*several), [_memory()]) == [True]


async def test_a_bound_on_create_time_is_the_index_s_to_find(memories: Database) -> None:
    compiled = compile_filter(all_of(compare("create_time", "GTE", "2026-07-01T12:30:15Z")), 1)
    async with memories.transaction():
        await memories.execute("SET LOCAL enable_seqscan = off")
        plan = await memories.fetchval(
            f"EXPLAIN (FORMAT JSON) SELECT id FROM public.memories WHERE slot = 1 AND user_id = 'u'"
            f" AND deleted_at IS NULL AND {compiled.sql} ORDER BY create_time DESC, id DESC",
            *compiled.parameters,
        )
    assert "create_time >=" in json.loads(plan)[0]["Plan"]["Index Cond"]


def _memory(**fields: Any) -> pb.Memory:
    moment = to_timestamp(NOON)
    return pb.Memory(**{"create_time": moment, "update_time": moment, "type": 1, "importance": 0.5, **fields})
