"""Conditions for listings and searches, written as Python.

    from memshard.filters import field

    tea = field("metadata.topic") == "tea"
    recent = field("create_time") >= datetime(2030, 1, 1, tzinfo=UTC)
    client.search("what does she drink?", user_id="alice", filter=tea & recent & ~field("metadata.hidden").exists())

Fields are `metadata.a.b`, and agent_id, session_id, type, importance, create_time, update_time, expire_time. Numbers
compare as numbers, times as times. A field that a memory lacks matches nothing but !=, not_in and exists(False).

`&`, `|` and `~` join conditions; Python binds them tighter than comparisons, so that comparisons need parentheses.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from google.protobuf import struct_pb2, text_format

from memshard import _values
from memshard.errors import invalid
from memshard.types import MemoryType
from memshard.v1 import memory_pb2 as pb

__all__ = ["Field", "Filter", "field"]

_TYPE_PREFIX: Final = "MEMORY_TYPE_"


class Filter:
    """A condition on memories; `field` makes one. It never changes."""

    __slots__ = ("_message",)

    def __init__(self, message: pb.Filter) -> None:
        self._message = message

    def message(self) -> pb.Filter:
        """The filter of the wire contract."""
        copy = pb.Filter()
        copy.CopyFrom(self._message)
        return copy

    def __and__(self, other: Filter) -> Filter:
        if not isinstance(other, Filter):
            return NotImplemented
        return Filter(pb.Filter(all_of=pb.FilterList(filters=[*self._parts("all_of"), *other._parts("all_of")])))

    def __or__(self, other: Filter) -> Filter:
        if not isinstance(other, Filter):
            return NotImplemented
        return Filter(pb.Filter(any_of=pb.FilterList(filters=[*self._parts("any_of"), *other._parts("any_of")])))

    def __invert__(self) -> Filter:
        return Filter(pb.Filter(negation=self._message))

    def __bool__(self) -> bool:
        # `a and b` would silently be b, `1 < field < 9` only its second half.
        raise TypeError("a condition has no truth of its own: join conditions with & | ~, and write a < b < c as two")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and self._message == other._message

    def __hash__(self) -> int:
        return hash(self._message.SerializeToString(deterministic=True))

    def __repr__(self) -> str:
        return f"Filter({text_format.MessageToString(self._message, as_utf8=True, as_one_line=True)})"

    def _parts(self, kind: str) -> list[pb.Filter]:
        """What this is made of, if it joins by `kind` already: a & b & c is one list, as depth is limited."""
        return (
            list(getattr(self._message, kind).filters) if self._message.WhichOneof("kind") == kind else [self._message]
        )


class Field:
    """A field of a memory, to be compared. Values are JSON-like; times have a zone; a type is a MemoryType."""

    __slots__ = ("_path",)
    __hash__ = None  # type: ignore[assignment]  # Comparing makes a condition, so that a set could not hold it.

    def __init__(self, path: str) -> None:
        self._path = _values.text("field", path)
        if not path:
            raise invalid("field", "must not be empty")

    def __eq__(self, value: object) -> Filter:  # type: ignore[override]
        return self._compare(pb.OPERATOR_EQ, self._value(value))

    def __ne__(self, value: object) -> Filter:  # type: ignore[override]
        return self._compare(pb.OPERATOR_NE, self._value(value))

    def __lt__(self, value: object) -> Filter:
        return self._compare(pb.OPERATOR_LT, self._value(value))

    def __le__(self, value: object) -> Filter:
        return self._compare(pb.OPERATOR_LTE, self._value(value))

    def __gt__(self, value: object) -> Filter:
        return self._compare(pb.OPERATOR_GT, self._value(value))

    def __ge__(self, value: object) -> Filter:
        return self._compare(pb.OPERATOR_GTE, self._value(value))

    def in_(self, values: Iterable[object]) -> Filter:
        """Whether the field is one of these."""
        return self._compare(pb.OPERATOR_IN, self._list(values))

    def not_in(self, values: Iterable[object]) -> Filter:
        """Whether the field is none of these, or is not there."""
        return self._compare(pb.OPERATOR_NOT_IN, self._list(values))

    def contains(self, value: object) -> Filter:
        """Whether a string holds this text, or a list this element."""
        return self._compare(pb.OPERATOR_CONTAINS, self._value(value))

    def exists(self, wanted: bool = True) -> Filter:
        """Whether the memory has the field; with False, whether it lacks it."""
        return self._compare(pb.OPERATOR_EXISTS, struct_pb2.Value(bool_value=bool(wanted)))

    def __repr__(self) -> str:
        return f"field({self._path!r})"

    def _compare(self, operator: pb.Operator.ValueType, value: struct_pb2.Value) -> Filter:
        return Filter(pb.Filter(comparison=pb.Comparison(field=self._path, operator=operator, value=value)))

    def _value(self, value: object) -> struct_pb2.Value:
        if isinstance(value, datetime):
            moment = _values.timestamp(self._path, value).ToDatetime(tzinfo=UTC)
            return struct_pb2.Value(string_value=moment.isoformat().replace("+00:00", "Z"))
        if isinstance(value, MemoryType):
            return struct_pb2.Value(string_value=_TYPE_PREFIX + value.name)
        return _values.json_value(self._path, value)

    def _list(self, values: Iterable[object]) -> struct_pb2.Value:
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise invalid(self._path, "must be compared with a list of values")
        return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[self._value(value) for value in values]))


def field(path: str) -> Field:
    """The field at this path, such as `importance` or `metadata.topic`."""
    return Field(path)
