"""Single values between Python and the wire: metadata, embeddings, times, text. Pure functions."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any, Final

from google.protobuf import struct_pb2, timestamp_pb2

from memshard.errors import invalid
from memshard.types import Embedding, Metadata

_MAX_EXACT_INT: Final = 2**53
"""Beyond it a double, which is all that google.protobuf.Struct has, skips integers."""

_MAX_DEPTH: Final = 30
"""Far above what the service takes (8), below protobuf's limit of 100 nested messages, of which a level needs three."""


def text(field: str, value: str) -> str:
    """The text itself, when the wire can carry it."""
    if not isinstance(value, str):
        raise invalid(field, f"must be a str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(field, "is not valid Unicode: it holds a lone surrogate") from error
    return value


def struct_from_metadata(metadata: Metadata, path: str = "metadata") -> struct_pb2.Struct:
    """The Struct for a JSON-like mapping. What would come back as something else is refused."""
    result = struct_pb2.Struct()
    _fill_struct(result, metadata, path, 1)
    return result


def json_value(field: str, value: object) -> struct_pb2.Value:
    """The Value for JSON-like data. What would come back as something else is refused."""
    result = struct_pb2.Value()
    _fill_value(result, value, field, 1)
    return result


def metadata_from_struct(message: struct_pb2.Struct) -> dict[str, Any]:
    """The mapping in a Struct, its keys sorted, as a map of the wire has no order of its own.

    Numbers without a fraction come back as int: the wire cannot tell 3 from 3.0.
    """
    return {key: _from_value(value) for key, value in sorted(message.fields.items())}


def fill_floats(field: str, target: MutableSequence[float], values: Embedding) -> None:
    """Appends the values of a sequence or an array to a repeated field."""
    # Filling a repeated field from an ndarray is ten times slower than from a list.
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str | bytes) or not isinstance(plain, Iterable):
        raise invalid(field, "must be a sequence of numbers")
    try:
        target.extend(plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(field, "must be a flat sequence of numbers") from error


def number(field: str, value: float) -> float:
    """The number as a float. Any real number will do, also a scalar of numpy."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid(field, f"must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise invalid(field, "is too large a number") from error


def count(field: str, value: int, *, least: int, bits: int = 32) -> int:
    """The whole number as an int, when it fits a signed integer of so many bits and is not below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < 2 ** (bits - 1):
        raise invalid(field, f"must be a whole number of at least {least}, not {value!r}")
    return int(value)


def timestamp(field: str, value: datetime) -> timestamp_pb2.Timestamp:
    """The Timestamp of an aware datetime. A naive one is refused: its meaning depends on the machine."""
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise invalid(field, "must be a datetime with a time zone")
    result = timestamp_pb2.Timestamp()
    result.FromDatetime(value)
    return result


def from_timestamp(message: timestamp_pb2.Timestamp) -> datetime:
    """The datetime in UTC, to the microsecond."""
    return message.ToDatetime(tzinfo=UTC)


def shortest_float(value: float) -> float:
    """The shortest decimal that is the same float32: what was stored as 0.3 reads as 0.3, not 0.30000001192092896."""
    if not math.isfinite(value):
        return value
    single = struct.pack("<f", value)
    for digits in range(6, 9):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == single:
            return candidate
    return value


def _fill_struct(target: struct_pb2.Struct, mapping: Metadata, path: str, depth: int) -> None:
    if not isinstance(mapping, Mapping):
        raise invalid(path, f"must be a mapping, not {type(mapping).__name__}")
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise invalid(path, f"has a key that is not a str: {key!r}")
        _fill_value(target.fields[text(path, key)], value, f"{path}.{key}", depth)


def _fill_value(target: struct_pb2.Value, value: Any, path: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise invalid(path, f"is nested more than {_MAX_DEPTH} deep")
    if value is None:
        target.null_value = struct_pb2.NULL_VALUE
    elif isinstance(value, bool):  # Before int, which bool is too.
        target.bool_value = value
    elif isinstance(value, str):
        target.string_value = text(path, value)
    elif isinstance(value, Real):
        target.number_value = _json_number(path, value)
    elif isinstance(value, Mapping):
        # An empty mapping must be marked as set, or the value would be of no kind at all.
        target.struct_value.SetInParent()
        _fill_struct(target.struct_value, value, path, depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        target.list_value.SetInParent()
        for index, item in enumerate(value):
            _fill_value(target.list_value.values.add(), item, f"{path}[{index}]", depth + 1)
    else:
        raise invalid(path, f"cannot hold a {type(value).__name__}")


def _json_number(path: str, value: Real) -> float:
    if isinstance(value, Integral) and abs(int(value)) > _MAX_EXACT_INT:
        raise invalid(path, "is an integer beyond 2^53, which would lose digits: store it as a string")
    if not math.isfinite(value):
        raise invalid(path, "must be a finite number")
    return float(value)


def _from_value(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) <= _MAX_EXACT_INT else number
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return metadata_from_struct(value.struct_value)
        case "list_value":
            return [_from_value(item) for item in value.list_value.values]
        case _:
            return None
