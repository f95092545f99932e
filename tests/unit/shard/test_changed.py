"""Keys are read from what PostgreSQL's pgoutput writes: messages as its documentation has them."""

import struct

import pytest

from shard.moving.changed import keys_of
from shard.moving.streams import StreamError


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


def _relation(oid: int, name: str, *columns: tuple[str, bool]) -> bytes:
    head = b"R" + struct.pack(">I", oid) + _text("public") + _text(name) + b"d" + struct.pack(">h", len(columns))
    return head + b"".join(
        (b"\x01" if is_key else b"\x00") + _text(column) + struct.pack(">Ii", 25, -1) for column, is_key in columns
    )


def _row(*values: str | None) -> bytes:
    coded = [
        b"u" if value is None else b"t" + struct.pack(">I", len(value.encode())) + value.encode() for value in values
    ]
    return struct.pack(">h", len(values)) + b"".join(coded)


_BEGIN = b"B" + bytes(20)
_MEMORIES = _relation(7, "memories", ("slot", True), ("content", False), ("id", True))
_OID = struct.pack(">I", 7)


def test_keys_of_inserts_updates_and_deletes_are_found() -> None:
    messages = [
        _BEGIN,
        _MEMORIES,
        b"I" + _OID + b"N" + _row("1", "green tea", "a"),
        b"U" + _OID + b"N" + _row("2", None, "b"),
        b"U" + _OID + b"K" + _row("3", None, "c") + b"N" + _row("4", None, "d"),
        b"D" + _OID + b"K" + _row("5", None, "é"),
        b"C" + bytes(25),
    ]
    assert keys_of(messages) == {"memories": {("1", "a"), ("2", "b"), ("3", "c"), ("4", "d"), ("5", "é")}}


def test_nobody_knows_what_a_truncate_removed() -> None:
    with pytest.raises(StreamError, match="truncated"):
        keys_of([_MEMORIES, b"T" + bytes(9)])
