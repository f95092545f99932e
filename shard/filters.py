"""A filter as SQL: a boolean expression over the columns of `memories`, with all that a caller wrote in parameters.

The router has checked the filter (router/filters.py). The expression is true or false for every row, never NULL, and
means this. A field that a memory lacks matches nothing but NE, NOT_IN and EXISTS = false.

- Lacking are: a path in metadata that leads nowhere; an empty agent_id or session_id; an expire_time never set. A path
  goes through objects by their keys and never into a list. JSON null is there: EXISTS finds it, EQ null matches it.
- NE and NOT_IN are the negations of EQ and IN, and `negation` that of what it holds: each matches exactly the memories
  that the other does not, those included that lack the field.
- EQ in metadata compares whole values, of lists and objects too: numbers as numbers (1 is 1.0, "1" is not), strings
  byte by byte, lists in their order, objects in any. Values of different JSON types are never equal.
- Ordering (GT, GTE, LT, LTE) compares numbers as numbers and strings by the bytes of their UTF-8; a value of another
  JSON type than the operand's does not match. IN matches if EQ matches with any item.
- CONTAINS finds a string in a string, literally (no wildcards, no folding of case; "" is in every string), or a string,
  number or boolean among the elements of a list, not deeper.
- A comparison has the precision of the field: importance is rounded to single precision, so that 0.7 is the 0.7 that
  was stored, and times are cut to the microsecond as they are when stored.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
from google.protobuf import json_format, struct_pb2

from memshard.v1 import memory_pb2 as pb


@dataclass(frozen=True, slots=True)
class CompiledFilter:
    """The expression, in parentheses where it needs them, and the values of its parameters in asyncpg's types."""

    sql: str
    parameters: list[Any]


def compile_filter(filter: pb.Filter, first_parameter: int) -> CompiledFilter:
    """A checked filter as SQL, its parameters from $`first_parameter` on. ValueError: it cannot have been checked."""
    parameters = _Parameters(first_parameter)
    return CompiledFilter(_condition(filter, parameters), parameters.values)


class _Parameters:
    """The values so far."""

    def __init__(self, first: int) -> None:
        self._first = first
        self.values: list[Any] = []

    def add(self, value: Any, sql_type: str) -> str:
        """The SQL for one more value."""
        self.values.append(value)
        return f"${self._first + len(self.values) - 1}::{sql_type}"


def _condition(filter: pb.Filter, parameters: _Parameters) -> str:
    match filter.WhichOneof("kind"):
        case "comparison":
            return _comparison(filter.comparison, parameters)
        case "all_of":
            return _joined(" AND ", filter.all_of, parameters)
        case "any_of":
            return _joined(" OR ", filter.any_of, parameters)
        case "negation":
            return _not(_condition(filter.negation, parameters))
    raise ValueError("a filter of no kind")


def _joined(word: str, joined: pb.FilterList, parameters: _Parameters) -> str:
    if not joined.filters:
        raise ValueError("an empty list of filters")
    return f"({word.join(_condition(filter, parameters) for filter in joined.filters)})"


def _not(sql: str) -> str:
    return f"(NOT {sql})"


@dataclass(frozen=True, slots=True)
class _Field:
    """`sql` gives the field's value, NULL where a memory lacks it; `operand` makes a filter's value comparable."""

    sql: str
    sql_type: str
    operand: Callable[[struct_pb2.Value], Any]
    always_there: bool = False

    def compare(self, symbol: str, parameter: str) -> str:
        """A comparison that is false where the value is missing."""
        return self.true(f"{self.sql} {symbol} {parameter}")

    def true(self, sql: str) -> str:
        """The condition, false where the field's NULL makes it NULL."""
        # The bare comparison lets the planner use an index.
        return f"({sql})" if self.always_there else f"coalesce({sql}, false)"


def _json(value: struct_pb2.Value) -> str:
    """JSON text, written as rows.to_json writes metadata, so that a number is the same decimal on both sides."""
    return json.dumps(json_format.MessageToDict(value), ensure_ascii=False, allow_nan=False)


def _text(value: struct_pb2.Value) -> str:
    return value.string_value


def _type(value: struct_pb2.Value) -> int:
    return pb.MemoryType.Value(f"MEMORY_TYPE_{value.string_value.removeprefix('MEMORY_TYPE_')}")


def _single(value: struct_pb2.Value) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value.number_value))  # Beyond its range, infinity, which compares as it should.


def _time(value: struct_pb2.Value) -> datetime:
    return datetime.fromisoformat(value.string_value)


_COLUMNS = {
    "agent_id": _Field("nullif(agent_id, '') COLLATE \"C\"", "text", _text),
    "session_id": _Field("nullif(session_id, '') COLLATE \"C\"", "text", _text),
    "type": _Field("type", "smallint", _type, always_there=True),
    "importance": _Field("importance", "real", _single, always_there=True),
    "create_time": _Field("create_time", "timestamptz", _time, always_there=True),
    "update_time": _Field("update_time", "timestamptz", _time, always_there=True),
    "expire_time": _Field("expire_time", "timestamptz", _time),
}


def _comparison(comparison: pb.Comparison, parameters: _Parameters) -> str:
    compare = _OPERATORS.get(comparison.operator)
    if compare is None:
        raise ValueError(f"{comparison.operator} is no operator")
    return compare(_field(comparison.field, parameters), comparison.value, parameters)


def _field(name: str, parameters: _Parameters) -> _Field:
    if name in _COLUMNS:
        return _COLUMNS[name]
    root, *path = name.split(".")
    if root != "metadata" or not path:
        raise ValueError("a field that filters do not know")
    # `->` with a text finds nothing in a list, where `#>` would take "0" for the first element.
    steps = "".join(f" -> {parameters.add(key, 'text')}" for key in path)
    return _Field(f"(metadata{steps})", "jsonb", _json)


def _equal(field: _Field, value: struct_pb2.Value, parameters: _Parameters) -> str:
    return field.compare("=", parameters.add(field.operand(value), field.sql_type))


def _one_of(field: _Field, value: struct_pb2.Value, parameters: _Parameters) -> str:
    items = [field.operand(item) for item in value.list_value.values]
    return field.compare("=", f"ANY ({parameters.add(items, f'{field.sql_type}[]')})")


def _ordered(symbol: str, field: _Field, value: struct_pb2.Value, parameters: _Parameters) -> str:
    if field.sql_type != "jsonb":
        return field.compare(symbol, parameters.add(field.operand(value), field.sql_type))
    if value.WhichOneof("kind") == "number_value":
        operand = parameters.add(_json(value), "jsonb")
        return field.true(f"jsonb_typeof({field.sql}) = 'number' AND {field.sql} {symbol} {operand}")
    # Not as jsonb, which orders strings by the collation of the database.
    operand = parameters.add(_text(value), "text")
    return field.true(
        f"jsonb_typeof({field.sql}) = 'string' AND ({field.sql} #>> '{{}}') COLLATE \"C\" {symbol} {operand}"
    )


def _contains(field: _Field, value: struct_pb2.Value, parameters: _Parameters) -> str:
    if field.sql_type != "jsonb":
        return field.true(f"strpos({field.sql}, {parameters.add(_text(value), 'text')}) > 0")
    if value.WhichOneof("kind") != "string_value":
        operand = parameters.add(_json(value), "jsonb")
        return field.true(f"jsonb_typeof({field.sql}) = 'array' AND {field.sql} @> {operand}")
    operand = parameters.add(_text(value), "text")
    return (
        f"CASE jsonb_typeof({field.sql})"
        f" WHEN 'string' THEN strpos(({field.sql} #>> '{{}}') COLLATE \"C\", {operand}) > 0"
        f" WHEN 'array' THEN {field.sql} ? {operand} ELSE false END"
    )


def _exists(field: _Field, value: struct_pb2.Value, _: _Parameters) -> str:
    wanted = value.WhichOneof("kind") is None or value.bool_value
    return f"({field.sql} IS {'NOT NULL' if wanted else 'NULL'})"


_OPERATORS: dict[int, Callable[[_Field, struct_pb2.Value, _Parameters], str]] = {
    pb.OPERATOR_EQ: _equal,
    pb.OPERATOR_NE: lambda *given: _not(_equal(*given)),
    pb.OPERATOR_GT: partial(_ordered, ">"),
    pb.OPERATOR_GTE: partial(_ordered, ">="),
    pb.OPERATOR_LT: partial(_ordered, "<"),
    pb.OPERATOR_LTE: partial(_ordered, "<="),
    pb.OPERATOR_IN: _one_of,
    pb.OPERATOR_NOT_IN: lambda *given: _not(_one_of(*given)),
    pb.OPERATOR_CONTAINS: _contains,
    pb.OPERATOR_EXISTS: _exists,
}
