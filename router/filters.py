"""What a filter may be: how large and how deep, which fields it knows, which operators and values fit each. Pure.

Faults and their reasons; each names its place, such as `filter.all_of.filters[2].comparison.operator`:

    INVALID_FILTER        nothing is set, an empty all_of or any_of, a bad metadata path, NUL, NaN, infinity
    FILTER_TOO_LARGE      too many comparisons, too long a list or a value
    FILTER_TOO_DEEP       conditions in conditions beyond the bound
    UNKNOWN_FILTER_FIELD  no field that filters know
    UNKNOWN_OPERATOR      none given, or one of a newer contract
    WRONG_FILTER_TYPE     an operator or a value that does not fit the field

A path in metadata goes through objects by their keys, split at dots: it never counts the elements of a list, and a key
that itself has a dot cannot be named. What a checked filter means is told in shard/filters.py.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf import struct_pb2

from common.errors import InvalidArgument
from memshard.v1 import memory_pb2 as pb

MAX_COMPARISONS = 64  # By the contract, as is the depth.
MAX_DEPTH = 8
MAX_PATH_PARTS = 8  # Metadata is no deeper.
MAX_PATH_PART_BYTES = 256
MAX_VALUE_BYTES = 64 * 1024  # The longest text of a memory; of a list or an object, its size on the wire.
MAX_LIST_ITEMS = 256

bad = InvalidArgument.field


def check(filter: pb.Filter, field: str = "filter") -> None:
    """Raises InvalidArgument for the first fault of a filter that the request has as `field`."""
    for count, (comparison, path) in enumerate(_comparisons(filter, field, 1), start=1):
        if count > MAX_COMPARISONS:
            raise bad(field, "FILTER_TOO_LARGE", f"must have at most {MAX_COMPARISONS} comparisons")
        _comparison(comparison, path)


def _comparisons(filter: pb.Filter, path: str, depth: int) -> Iterator[tuple[pb.Comparison, str]]:
    """The comparisons in a filter and where each is, one at a time: what is too large is never walked to its end."""
    if depth > MAX_DEPTH:
        raise bad(path, "FILTER_TOO_DEEP", f"must be at most {MAX_DEPTH} deep")
    match filter.WhichOneof("kind"):
        case "comparison":
            yield filter.comparison, f"{path}.comparison"
        case "negation":
            yield from _comparisons(filter.negation, f"{path}.negation", depth + 1)
        case "all_of":
            yield from _listed(filter.all_of, f"{path}.all_of.filters", depth + 1)
        case "any_of":
            yield from _listed(filter.any_of, f"{path}.any_of.filters", depth + 1)
        case _:
            raise bad(path, "INVALID_FILTER", "must be a comparison, all_of, any_of or negation")


def _listed(joined: pb.FilterList, path: str, depth: int) -> Iterator[tuple[pb.Comparison, str]]:
    # Empty is more likely a caller's mistake than a wish for everything or nothing.
    if not joined.filters:
        raise bad(path, "INVALID_FILTER", "must not be empty")
    for index, filter in enumerate(joined.filters):
        yield from _comparisons(filter, f"{path}[{index}]", depth)


_STRING, _NUMBER, _BOOL = "string_value", "number_value", "bool_value"
_NULL, _STRUCT, _LIST = "null_value", "struct_value", "list_value"
_WORDS = {
    _STRING: "a string",
    _NUMBER: "a number",
    _BOOL: "a boolean",
    _NULL: "null",
    _STRUCT: "an object",
    _LIST: "a list",
}

_EQUALITY = (pb.OPERATOR_EQ, pb.OPERATOR_NE)
_ORDER = (pb.OPERATOR_GT, pb.OPERATOR_GTE, pb.OPERATOR_LT, pb.OPERATOR_LTE)
_MEMBERSHIP = (pb.OPERATOR_IN, pb.OPERATOR_NOT_IN)


@dataclass(frozen=True, slots=True)
class _Field:
    """Which kinds of value each operator takes, for IN and NOT_IN those of the items; other operators do not fit.

    `reads` says whether a string can be read as the field's value; `example` is one that can.
    """

    kinds: Mapping[int, tuple[str, ...]]
    reads: Callable[[str], bool] | None = None
    example: str = ""


def _field(kind: str, *operators: int, reads: Callable[[str], bool] | None = None, example: str = "") -> _Field:
    return _Field({pb.OPERATOR_EXISTS: (_BOOL,), **dict.fromkeys(operators, (kind,))}, reads, example)


_TYPES = {name for name, number in pb.MemoryType.items() if number != pb.MEMORY_TYPE_UNSPECIFIED}


def _is_type(text: str) -> bool:
    return f"MEMORY_TYPE_{text.removeprefix('MEMORY_TYPE_')}" in _TYPES


# RFC 3339 as Timestamp's JSON has it: capital letters, always an offset, no leap seconds.
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)


def _is_time(text: str) -> bool:
    if not _TIME.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):  # No such day, or in UTC no year of 1 to 9999.
        return False
    return True


_TEXT_FIELD = _field(_STRING, *_EQUALITY, *_ORDER, *_MEMBERSHIP, pb.OPERATOR_CONTAINS)
_TIME_FIELD = _field(_STRING, *_EQUALITY, *_ORDER, *_MEMBERSHIP, reads=_is_time, example="2026-07-01T12:30:15.123456Z")
_FIELDS = {
    "agent_id": _TEXT_FIELD,
    "session_id": _TEXT_FIELD,
    "type": _field(_STRING, *_EQUALITY, *_MEMBERSHIP, reads=_is_type, example="EPISODIC"),
    "importance": _field(_NUMBER, *_EQUALITY, *_ORDER, *_MEMBERSHIP),
    "create_time": _TIME_FIELD,
    "update_time": _TIME_FIELD,
    "expire_time": _TIME_FIELD,
}
_METADATA_FIELD = _Field(
    {
        **dict.fromkeys(_EQUALITY, tuple(_WORDS)),
        **dict.fromkeys(_ORDER, (_NUMBER, _STRING)),
        **dict.fromkeys(_MEMBERSHIP, (_STRING, _NUMBER, _BOOL)),
        pb.OPERATOR_CONTAINS: (_STRING, _NUMBER, _BOOL),
        pb.OPERATOR_EXISTS: (_BOOL,),
    }
)


def _comparison(comparison: pb.Comparison, path: str) -> None:
    field = _known_field(comparison.field, f"{path}.field")
    operator = comparison.operator
    if operator == pb.OPERATOR_UNSPECIFIED or operator not in pb.Operator.values():
        raise bad(f"{path}.operator", "UNKNOWN_OPERATOR", f"{operator} is no operator")
    kinds = field.kinds.get(operator)
    if kinds is None:
        raise bad(f"{path}.operator", "WRONG_FILTER_TYPE", f"{comparison.field} cannot be compared by it")
    value = comparison.value
    if operator in _MEMBERSHIP:
        _items(value, kinds, field, f"{path}.value")
    elif operator != pb.OPERATOR_EXISTS or value.WhichOneof("kind") is not None:
        _operand(value, kinds, field, f"{path}.value")


def _known_field(name: str, path: str) -> _Field:
    _string(name, path)
    if not name.startswith("metadata."):
        if name not in _FIELDS:
            raise bad(path, "UNKNOWN_FILTER_FIELD", f"must be metadata.<key>, or one of {', '.join(_FIELDS)}")
        return _FIELDS[name]
    parts = name.split(".")[1:]
    if len(parts) > MAX_PATH_PARTS:
        raise bad(path, "INVALID_FILTER", f"must have at most {MAX_PATH_PARTS} keys")
    if not all(1 <= len(part.encode()) <= MAX_PATH_PART_BYTES for part in parts):
        raise bad(path, "INVALID_FILTER", f"must have keys of 1 to {MAX_PATH_PART_BYTES} bytes between its dots")
    return _METADATA_FIELD


def _items(value: struct_pb2.Value, kinds: tuple[str, ...], field: _Field, path: str) -> None:
    """The list of IN and NOT_IN."""
    if value.WhichOneof("kind") != _LIST or not value.list_value.values:
        raise bad(path, "WRONG_FILTER_TYPE", "must be a list that is not empty")
    items = value.list_value.values
    if len(items) > MAX_LIST_ITEMS:
        raise bad(path, "FILTER_TOO_LARGE", f"must be at most {MAX_LIST_ITEMS} items")
    first = items[0].WhichOneof("kind")
    for index, item in enumerate(items):
        place = f"{path}.list_value.values[{index}]"
        _operand(item, kinds, field, place)
        if item.WhichOneof("kind") != first:
            raise bad(place, "WRONG_FILTER_TYPE", "must be of the same kind as the first item")


def _operand(value: struct_pb2.Value, kinds: tuple[str, ...], field: _Field, path: str) -> None:
    kind = value.WhichOneof("kind")
    if kind not in kinds:
        raise bad(path, "WRONG_FILTER_TYPE", f"must be {' or '.join(_WORDS[kind] for kind in kinds)}")
    if kind in {_STRUCT, _LIST} and value.ByteSize() > MAX_VALUE_BYTES:
        raise bad(path, "FILTER_TOO_LARGE", f"must be at most {MAX_VALUE_BYTES} bytes")
    _value(value, path)
    if kind == _STRING and field.reads is not None and not field.reads(value.string_value):
        raise bad(path, "WRONG_FILTER_TYPE", f"must be like {field.example}")


def _value(value: struct_pb2.Value, path: str) -> None:
    """What holds for a value of any kind, and for all that is in it."""
    match value.WhichOneof("kind"):
        case "string_value":
            _string(value.string_value, path)
        case "number_value" if not math.isfinite(value.number_value):
            raise bad(path, "INVALID_FILTER", "has a NaN or infinite number")
        case "struct_value":
            for key, item in value.struct_value.fields.items():
                _string(key, path)
                _value(item, path)
        case "list_value":
            for item in value.list_value.values:
                _value(item, path)
        case None:
            raise bad(path, "INVALID_FILTER", "has a value of no kind")


def _string(value: str, path: str) -> None:
    if len(value.encode()) > MAX_VALUE_BYTES:
        raise bad(path, "FILTER_TOO_LARGE", f"must be at most {MAX_VALUE_BYTES} bytes")
    if "\0" in value:
        raise bad(path, "INVALID_FILTER", "must not contain the character NUL")
