"""Filters as SQL: the text is the module's own, whatever the caller wrote. What it means is tested on PostgreSQL."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb
from shard.filters import compile_filter
from tests.support.filter_cases import Case, cases
from tests.support.filter_model import ABSENT, all_of, any_of, compare, negation

# All that a filter's SQL is made of: words, strings and symbols.
_WORDS = {
    *("agent_id", "session_id", "type", "importance", "metadata", "create_time", "update_time", "expire_time"),
    *("AND", "OR", "NOT", "IS", "NULL", "ANY", "CASE", "WHEN", "THEN", "ELSE", "END", "COLLATE", "false", "0"),
    *("coalesce", "nullif", "strpos", "jsonb_typeof"),
    *("text", "jsonb", "real", "smallint", "timestamptz"),
    *("''", "'{}'", "'number'", "'string'", "'array'", '"C"'),
    *("(", ")", ",", "::", "[]", "->", "#>>", "@>", "?", "=", "<", "<=", ">", ">="),
}
_TOKEN = re.compile(r"""\s+|(?P<parameter>\$\d+)|(?P<word>\w+|'[^']*'|"[^"]*"|::|\[\]|[-#@<>=?]+|[(),])""")


@given(cases(), st.integers(1, 50))
def test_text_is_the_module_s_own_and_parameters_are_numbered_in_turn(case: Case, first: int) -> None:
    for filter in case.filters:
        compiled = compile_filter(filter, first)
        numbers: set[int] = set()
        at = 0
        while at < len(compiled.sql):
            token = _TOKEN.match(compiled.sql, at)
            assert token is not None, compiled.sql[at:]
            assert token["word"] is None or token["word"] in _WORDS, compiled.sql
            if token["parameter"]:
                numbers.add(int(token["parameter"][1:]))
            at = token.end()
        assert numbers == set(range(first, first + len(compiled.parameters)))


@given(st.text(min_size=1).filter(lambda key: "." not in key), st.text())
def test_text_does_not_depend_on_keys_or_values(key: str, operand: str) -> None:
    for operator in ("EQ", "NE", "GT", "CONTAINS"):
        compiled = compile_filter(compare(f"metadata.{key}", operator, operand), 1)
        assert compiled.sql == compile_filter(compare("metadata.a", operator, "b"), 1).sql
        assert compiled.parameters[0] == key


@pytest.mark.parametrize(
    ("filter", "sql", "parameters"),
    [
        (
            all_of(compare("importance", "GT", 0.5), negation(compare("metadata.a.b", "EQ", "x"))),
            "((importance > $7::real) AND (NOT coalesce((metadata -> $8::text -> $9::text) = $10::jsonb, false)))",
            [0.5, "a", "b", '"x"'],
        ),
        (
            any_of(compare("type", "IN", ["WORKING", "MEMORY_TYPE_EPISODIC"]), compare("expire_time", "EXISTS", False)),
            "((type = ANY ($7::smallint[])) OR (expire_time IS NULL))",
            [[4, 1]],
        ),
        (
            compare("create_time", "LT", "2026-07-01T14:30:15.1234569+02:00"),
            "(create_time < $7::timestamptz)",
            [datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)],
        ),
        (compare("metadata.a", "IN", [1, 2.5]), "coalesce((metadata -> $7::text) = ANY ($8::jsonb[]), false)", None),
        (compare("metadata.a", "EXISTS", ABSENT), "((metadata -> $7::text) IS NOT NULL)", ["a"]),
    ],
)
def test_some_filters(filter: pb.Filter, sql: str, parameters: list[Any] | None) -> None:
    compiled = compile_filter(filter, 7)
    assert compiled.sql == sql
    if parameters is not None:
        assert compiled.parameters == parameters


# The embedded PostgreSQL has no collation that differs from "C", so that none of its answers would tell.
@pytest.mark.parametrize("field", ["metadata.a", "agent_id", "session_id"])
@pytest.mark.parametrize("operator", ["GT", "GTE", "LT", "LTE", "CONTAINS"])
def test_strings_are_compared_by_bytes_in_a_database_of_any_collation(field: str, operator: str) -> None:
    assert 'COLLATE "C"' in compile_filter(compare(field, operator, "a"), 1).sql


@pytest.mark.parametrize(
    "filter",
    [
        pytest.param(pb.Filter(), id="of no kind"),
        pytest.param(all_of(), id="an empty list"),
        pytest.param(compare("content", "EQ", "a"), id="an unknown field"),
        pytest.param(compare("metadata", "EQ", "a"), id="no path"),
        pytest.param(compare("type", "UNSPECIFIED", "a"), id="no operator"),
        pytest.param(compare("type", "EQ", "a"), id="an unknown type"),
        pytest.param(compare("create_time", "EQ", "a"), id="no time"),
    ],
)
def test_filter_that_nobody_checked_is_refused(filter: pb.Filter) -> None:
    with pytest.raises(ValueError, match=r"."):
        compile_filter(filter, 1)
