"""Rows and messages: what goes into the database comes out as it was."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import asyncpg
import numpy as np
import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st
from pgvector import HalfVector, Vector

from common.catalog import Precision
from memshard.v1 import memory_pb2 as pb
from shard.rows import from_microseconds, to_json, to_memory, to_microseconds, to_timestamp, to_vector

_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_json = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=10,
)
_metadata = st.dictionaries(_text, _json, max_size=5)

_NOON = datetime(2026, 7, 1, 12, 30, 15, 123456, tzinfo=UTC)


def _struct(value: dict[str, Any]) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(value)
    return made


def _row(**changes: object) -> asyncpg.Record:
    """A row as asyncpg gives it, which cannot be made by hand; a dictionary is read alike."""
    row: dict[str, object] = {
        "id": UUID("0190b5a4-7b3c-7def-8123-456789abcdef"),
        "user_id": "user-1",
        "agent_id": "agent-1",
        "session_id": "",
        "type": pb.MEMORY_TYPE_SEMANTIC,
        "content": "likes coffee",
        "metadata": "{}",
        "importance": 0.25,
        "embedding_model": "model-a",
        "pending": False,
        "create_time": _NOON,
        "update_time": _NOON,
        "expire_time": None,
        "version": 1,
        **changes,
    }
    return cast("asyncpg.Record", row)


def _jsonb(text: str) -> str:
    """The text that PostgreSQL gives back for a jsonb value: keys sorted, numbers as decimals written out in full."""
    return _written_out(json.loads(text, parse_float=Decimal, parse_int=Decimal))


def _written_out(value: Any) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_written_out(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written_out, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@given(_metadata)
def test_metadata_comes_back_from_the_database_as_it_was(value: dict[str, Any]) -> None:
    sent = _struct(value)
    read = to_memory(_row(metadata=_jsonb(to_json(sent))))
    assert read.metadata == sent
    assert read.HasField("metadata") == bool(value)


@pytest.mark.parametrize("number", [1.7976931348623157e308, 5e-324, 2.0**53 + 2, 0.1, -1e22, 1e-7, 123456789.000000001])
def test_numbers_in_metadata_are_exact_to_the_last_bit(number: float) -> None:
    read = to_memory(_row(metadata=_jsonb(to_json(_struct({"n": number})))))
    assert read.metadata["n"] == number


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_number_that_json_has_not_never_reaches_the_database(number: float) -> None:
    with pytest.raises(ValueError, match="number_value"):
        to_json(_struct({"n": number}))


@given(st.datetimes(timezones=st.just(UTC)))
def test_moment_is_exact_to_the_microsecond(moment: datetime) -> None:
    microseconds = to_microseconds(moment)
    assert from_microseconds(microseconds) == moment
    timestamp = to_timestamp(moment)
    assert timestamp.ToMicroseconds() == microseconds
    assert 0 <= timestamp.nanos < 1_000_000_000


@pytest.mark.parametrize(
    ("moment", "microseconds"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), -1),
        (datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 0),
        (datetime(9999, 12, 31, 23, 59, 59, 999998, tzinfo=UTC), 253_402_300_799_999_998),
        (datetime(1, 1, 1, tzinfo=UTC), -62_135_596_800_000_000),
    ],
)
def test_moment_at_the_ends_of_time_is_exact(moment: datetime, microseconds: int) -> None:
    assert to_microseconds(moment) == microseconds
    assert from_microseconds(microseconds) == moment


def test_infinity_is_never_stored_and_read_all_the_same() -> None:
    """asyncpg stores datetime.max as infinity, and reads that as a datetime without a time zone."""
    assert from_microseconds(253_402_300_799_999_999) < datetime.max.replace(tzinfo=UTC)
    assert to_microseconds(datetime.max) == 253_402_300_799_999_999


def test_row_becomes_a_memory() -> None:
    later = _NOON + timedelta(microseconds=1)
    read = to_memory(_row(update_time=later, expire_time=later, version=7, metadata='{"a": 1}'))
    assert read == pb.Memory(
        id="0190b5a4-7b3c-7def-8123-456789abcdef",
        user_id="user-1",
        agent_id="agent-1",
        type=pb.MEMORY_TYPE_SEMANTIC,
        content="likes coffee",
        metadata=_struct({"a": 1}),
        importance=0.25,
        embedding_model="model-a",
        embedding_state=pb.EMBEDDING_STATE_READY,
        create_time=to_timestamp(_NOON),
        update_time=to_timestamp(later),
        expire_time=to_timestamp(later),
        version=7,
    )


def test_memory_without_an_expiry_or_an_embedding_says_so() -> None:
    read = to_memory(_row(pending=True, embedding=None), include_embedding=True)
    assert not read.HasField("expire_time")
    assert read.embedding_state == pb.EMBEDDING_STATE_PENDING
    assert not read.embedding


def test_importance_of_zero_is_not_left_out() -> None:
    read = to_memory(_row(importance=0.0))
    assert read.HasField("importance")
    assert read.importance == 0


def test_embedding_is_read_only_when_asked_for() -> None:
    row = _row(embedding=Vector([1, 2, 3]))
    assert not to_memory(row).embedding
    assert list(to_memory(row, include_embedding=True).embedding) == [1, 2, 3]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_single_precision_keeps_every_bit(numbers: list[float]) -> None:
    stored = to_vector(pb.Memory(embedding=numbers).embedding, Precision.SINGLE)
    assert isinstance(stored, Vector)
    assert _read_back(Vector.from_binary(stored.to_binary())) == numbers


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=8))
def test_half_precision_keeps_the_nearest_half(numbers: list[float]) -> None:
    stored = to_vector(pb.Memory(embedding=numbers).embedding, Precision.HALF)
    assert isinstance(stored, HalfVector)
    read = _read_back(HalfVector.from_binary(stored.to_binary()))
    assert read == np.array(numbers, dtype=np.float16).tolist()
    # Half has 11 significant bits; below 2**-14 it has a fixed step of 2**-24.
    assert all(abs(was - now) <= max(abs(was) * 2**-11, 2**-25) for was, now in zip(numbers, read, strict=True))


def _read_back(stored: HalfVector | Vector) -> Sequence[float]:
    """The numbers of a stored embedding as a caller gets them."""
    return list(to_memory(_row(embedding=stored), include_embedding=True).embedding)
