"""What filters mean, worked out in memory and apart from the SQL; and filters from plain values.

Values are compared as pairs of a JSON type and what Python compares alike, so that nothing is equal across types.
"""

import ctypes
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeAlias

from google.protobuf import struct_pb2, timestamp_pb2

from memshard.v1 import memory_pb2 as pb

Typed: TypeAlias = tuple[str, Any]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""For `compare`: no value at all, which is not the same as null."""


def value(plain: Any) -> struct_pb2.Value:
    """A Value from what json.loads gives."""
    holder = struct_pb2.ListValue()
    holder.extend([plain])
    return holder.values[0]


def compare(field: str, operator: str, operand: Any = ABSENT) -> pb.Filter:
    """A lone comparison; `operator` is one like "EQ"."""
    comparison = pb.Comparison(field=field, operator=pb.Operator.Value(f"OPERATOR_{operator}"))
    if operand is not ABSENT:
        comparison.value.CopyFrom(value(operand))
    return pb.Filter(comparison=comparison)


def all_of(*filters: pb.Filter) -> pb.Filter:
    return pb.Filter(all_of=pb.FilterList(filters=filters))


def any_of(*filters: pb.Filter) -> pb.Filter:
    return pb.Filter(any_of=pb.FilterList(filters=filters))


def negation(filter: pb.Filter) -> pb.Filter:
    return pb.Filter(negation=filter)


def comparisons(filter: pb.Filter) -> Iterator[pb.Filter]:
    """All the lone comparisons in a filter."""
    match filter.WhichOneof("kind"):
        case "comparison":
            yield filter
        case "negation":
            yield from comparisons(filter.negation)
        case "all_of":
            yield from chain.from_iterable(map(comparisons, filter.all_of.filters))
        case "any_of":
            yield from chain.from_iterable(map(comparisons, filter.any_of.filters))


def matches(filter: pb.Filter, memory: pb.Memory) -> bool:
    """Whether a memory is among those that a filter is for."""
    kind = filter.WhichOneof("kind")
    if kind == "comparison":
        return _holds(filter.comparison, memory)
    if kind == "negation":
        return not matches(filter.negation, memory)
    if kind == "all_of":
        return all(matches(inner, memory) for inner in filter.all_of.filters)
    assert kind == "any_of"
    return any(matches(inner, memory) for inner in filter.any_of.filters)


def _holds(comparison: pb.Comparison, memory: pb.Memory) -> bool:
    field, operand = comparison.field, comparison.value
    found = _find(memory, field)
    match pb.Operator.Name(comparison.operator).removeprefix("OPERATOR_"):
        case "EXISTS":
            answer = (found is not None) == (operand.bool_value if operand.HasField("bool_value") else True)
        case "EQ":
            answer = found is not None and found == _operand(field, operand)
        case "NE":
            answer = found is None or found != _operand(field, operand)
        case "IN":
            answer = found is not None and found in [_operand(field, item) for item in operand.list_value.values]
        case "NOT_IN":
            answer = found is None or found not in [_operand(field, item) for item in operand.list_value.values]
        case "CONTAINS":
            answer = found is not None and _contains(found, _operand(field, operand))
        case operator:
            answer = found is not None and _ordered(found, operator, _operand(field, operand))
    return answer


def _contains(found: Typed, wanted: Typed) -> bool:
    if found[0] == "list":
        return wanted in list(found[1])
    return found[0] == wanted[0] == "string" and bytes(wanted[1]) in bytes(found[1])


def _ordered(found: Typed, operator: str, wanted: Typed) -> bool:
    if found[0] != wanted[0]:
        return False
    less, more = bool(found[1] < wanted[1]), bool(found[1] > wanted[1])
    return {"GT": more, "GTE": not less, "LT": less, "LTE": not more}[operator]


def _find(memory: pb.Memory, field: str) -> Typed | None:
    """The value that a memory has in a field; None is lacking."""
    if field in {"agent_id", "session_id"}:
        text = getattr(memory, field)
        return ("string", text.encode()) if text else None
    if field == "type":
        return ("type", memory.type)
    if field == "importance":
        return ("single", memory.importance)
    if field in {"create_time", "update_time", "expire_time"}:
        moment: timestamp_pb2.Timestamp = getattr(memory, field)
        return ("time", moment.ToMicroseconds()) if moment != timestamp_pb2.Timestamp() else None
    here = struct_pb2.Value(struct_value=memory.metadata)
    for key in field.split(".")[1:]:
        if not here.HasField("struct_value") or key not in here.struct_value.fields:
            return None
        here = here.struct_value.fields[key]
    return _typed(here)


def _operand(field: str, operand: struct_pb2.Value) -> Typed:
    if field == "type":
        return ("type", pb.MemoryType.Value("MEMORY_TYPE_" + operand.string_value.split("MEMORY_TYPE_")[-1]))
    if field == "importance":
        return ("single", ctypes.c_float(operand.number_value).value)
    if field in {"create_time", "update_time", "expire_time"}:
        moment = timestamp_pb2.Timestamp()
        moment.FromJsonString(operand.string_value)
        return ("time", moment.ToMicroseconds())
    return _typed(operand)


def _typed(given: struct_pb2.Value) -> Typed:
    kind = given.WhichOneof("kind")
    if kind == "string_value":
        return ("string", given.string_value.encode())
    if kind == "number_value":
        return ("number", given.number_value)
    if kind == "bool_value":
        return ("bool", given.bool_value)
    if kind == "list_value":
        return ("list", [_typed(item) for item in given.list_value.values])
    if kind == "struct_value":
        return ("object", {key: _typed(item) for key, item in given.struct_value.fields.items()})
    assert kind == "null_value"
    return ("null", None)
