"""What a request may be: every fault has its reason and names its field; the bounds themselves are valid."""

import math
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf import duration_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from common.catalog import Precision
from common.errors import InvalidArgument
from memshard.v1 import memory_pb2 as pb
from router import validate
from tests.unit.router.memories import cluster, memories, memory, struct, taken, with_server_fields

_HALF, _SINGLE = cluster(), cluster(Precision.SINGLE)


def _nested(depth: int, leaf: Any = 1, *, lists: bool = False) -> dict[str, Any]:
    """Metadata of this depth: structs in structs, or one struct with lists in lists."""
    value: Any = leaf
    for _ in range(depth - 1):
        value = [value] if lists else {"a": value}
    return {"a": value}


def _sized(size_bytes: int) -> Any:
    """Metadata that takes exactly this much on the wire."""
    for length in range(size_bytes - 20, size_bytes):
        made = struct({"a": "x" * length})
        if made.ByteSize() == size_bytes:
            return made
    raise AssertionError(f"no text makes {size_bytes} bytes")


def _unset_value() -> Any:
    made = struct({})
    made.fields["a"].SetInParent()
    return made


_BAD_MEMORIES: list[tuple[str, dict[str, Any], str, str]] = [
    ("no user", {"user_id": ""}, "INVALID_USER_ID", "memory.user_id"),
    ("a user of 257 bytes", {"user_id": "u" * 257}, "INVALID_USER_ID", "memory.user_id"),
    ("a user of 257 bytes in 129 characters", {"user_id": "ü" * 128 + "u"}, "INVALID_USER_ID", "memory.user_id"),
    ("a user with NUL", {"user_id": "a\0b"}, "INVALID_USER_ID", "memory.user_id"),
    ("an id that is no UUID", {"id": "memory-1"}, "INVALID_ID", "memory.id"),
    ("an id without hyphens", {"id": uuid.uuid4().hex}, "INVALID_ID", "memory.id"),
    ("an id in braces", {"id": f"{{{uuid.uuid4()}}}"}, "INVALID_ID", "memory.id"),
    ("an id with a line feed", {"id": f"{uuid.uuid4()}\n"}, "INVALID_ID", "memory.id"),
    ("an id in other digits", {"id": "\u0660190b5a4-7b3c-7def-8123-456789abcdef"}, "INVALID_ID", "memory.id"),
    ("no content", {"content": ""}, "INVALID_CONTENT", "memory.content"),
    ("content of 64 KiB and a byte", {"content": "x" * 65537}, "INVALID_CONTENT", "memory.content"),
    ("content over 64 KiB in few characters", {"content": "€" * 21846}, "INVALID_CONTENT", "memory.content"),
    ("content with NUL", {"content": "a\0b"}, "INVALID_CONTENT", "memory.content"),
    ("an agent of 257 bytes", {"agent_id": "a" * 257}, "INVALID_NAME", "memory.agent_id"),
    ("an agent with NUL", {"agent_id": "\0"}, "INVALID_NAME", "memory.agent_id"),
    ("a session of 257 bytes", {"session_id": "s" * 257}, "INVALID_NAME", "memory.session_id"),
    ("a session with NUL", {"session_id": "\0"}, "INVALID_NAME", "memory.session_id"),
    ("a type that is none", {"type": 99}, "INVALID_ENUM", "memory.type"),
    ("a type below zero", {"type": -1}, "INVALID_ENUM", "memory.type"),
    ("importance below zero", {"importance": -0.001}, "OUT_OF_RANGE", "memory.importance"),
    ("importance above one", {"importance": 1.001}, "OUT_OF_RANGE", "memory.importance"),
    ("importance NaN", {"importance": math.nan}, "OUT_OF_RANGE", "memory.importance"),
    ("importance infinite", {"importance": math.inf}, "OUT_OF_RANGE", "memory.importance"),
    ("another model", {"embedding_model": "model-b"}, "WRONG_MODEL", "memory.embedding_model"),
    ("a model of 257 bytes", {"embedding_model": "m" * 257}, "INVALID_NAME", "memory.embedding_model"),
    ("a model with NUL", {"embedding_model": "model-a\0"}, "INVALID_NAME", "memory.embedding_model"),
    ("metadata over 32 KiB", {"metadata": _sized(32769)}, "METADATA_TOO_LARGE", "memory.metadata"),
    ("metadata 9 deep", {"metadata": struct(_nested(9))}, "METADATA_TOO_DEEP", "memory.metadata"),
    ("lists 9 deep", {"metadata": struct(_nested(9, lists=True))}, "METADATA_TOO_DEEP", "memory.metadata"),
    ("an empty list 9 deep", {"metadata": struct(_nested(8, []))}, "METADATA_TOO_DEEP", "memory.metadata"),
    ("metadata with NUL in a key", {"metadata": struct({"a\0": 1})}, "INVALID_METADATA", "memory.metadata"),
    ("metadata with NUL in a value", {"metadata": struct(_nested(4, "\0"))}, "INVALID_METADATA", "memory.metadata"),
    ("metadata with NUL in a list", {"metadata": struct({"a": ["", "\0"]})}, "INVALID_METADATA", "memory.metadata"),
    ("metadata with NaN", {"metadata": struct({"a": math.nan})}, "INVALID_METADATA", "memory.metadata"),
    ("metadata with infinity", {"metadata": struct({"a": [-math.inf]})}, "INVALID_METADATA", "memory.metadata"),
    ("metadata with a value of no kind", {"metadata": _unset_value()}, "INVALID_METADATA", "memory.metadata"),
    ("an expiry of the year 0", {"expire_time": {"seconds": -62135596801}}, "INVALID_TIMESTAMP", "memory.expire_time"),
    ("an expiry of 10000", {"expire_time": {"seconds": 253402300800}}, "INVALID_TIMESTAMP", "memory.expire_time"),
    ("2**62 seconds", {"expire_time": {"seconds": 2**62}}, "INVALID_TIMESTAMP", "memory.expire_time"),
    (
        "a second of nanoseconds",
        {"expire_time": {"seconds": 4_000_000_000, "nanos": 10**9}},
        "INVALID_TIMESTAMP",
        "memory.expire_time",
    ),
    (
        "nanoseconds below zero",
        {"expire_time": {"seconds": 4_000_000_000, "nanos": -1}},
        "INVALID_TIMESTAMP",
        "memory.expire_time",
    ),
    ("three numbers", {"embedding": [1, 2, 3]}, "WRONG_DIMENSION", "memory.embedding"),
    ("five numbers", {"embedding": [1, 2, 3, 4, 5]}, "WRONG_DIMENSION", "memory.embedding"),
    ("NaN", {"embedding": [1, 2, math.nan, 4]}, "NOT_FINITE", "memory.embedding"),
    ("infinity", {"embedding": [1, 2, -math.inf, 4]}, "NOT_FINITE", "memory.embedding"),
    ("all zeros", {"embedding": [0, 0, -0.0, 0]}, "ZERO_VECTOR", "memory.embedding"),
]


def _fault(call: Callable[[], object]) -> tuple[str, str]:
    """Reason and field of a refusal."""
    with pytest.raises(InvalidArgument) as caught:
        call()
    (violation,) = caught.value.violations
    assert violation.description
    assert caught.value.message == f"{violation.field}: {violation.description}"
    return caught.value.reason, violation.field


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [pytest.param(changes, reason, field, id=name) for name, changes, reason, field in _BAD_MEMORIES],
)
def test_bad_memory_is_refused_with_its_reason_and_field(changes: dict[str, Any], reason: str, field: str) -> None:
    for kind in (_HALF, _SINGLE):
        assert _fault(lambda kind=kind: validate.new_memory(memory(**changes), kind)) == (reason, field)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        pytest.param([65520, 0, 0, 0], "OUT_OF_RANGE", id="rounds to infinity"),
        pytest.param([1, 2, 3, -1e30], "OUT_OF_RANGE", id="far beyond half"),
        pytest.param([2.9e-8, -2.9e-8, 0, 0], "ZERO_VECTOR", id="rounds to zero"),
        pytest.param([1e-45, 0, 0, 0], "ZERO_VECTOR", id="smallest float32"),
    ],
)
def test_embedding_that_half_precision_cannot_hold_is_refused(numbers: list[float], reason: str) -> None:
    assert _fault(lambda: validate.embedding(numbers, _HALF, "embedding")) == (reason, "embedding")


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([1e20, 1e20, 0, 0], id="square overflows"),
        pytest.param([3.4e38, 0, 0, 0], id="largest float32"),
        pytest.param([1e-25, 1e-25, 0, 0], id="square underflows"),
        pytest.param([1e-45, 0, 0, 0], id="smallest float32"),
    ],
)
def test_embedding_whose_length_float32_cannot_hold_is_refused(numbers: list[float]) -> None:
    """pgvector sums squares in float32: it would compare such an embedding to any other wrongly, and say nothing."""
    assert _fault(lambda: validate.embedding(numbers, _SINGLE, "embedding")) == ("OUT_OF_RANGE", "embedding")


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([65504, -65504, 65504, 65504], id="half's largest"),
        pytest.param([65519, 0, 0, 0], id="rounds to half's largest"),
        pytest.param([6e-8, 0, 0, 0], id="half's smallest"),
        pytest.param([1, 1e-30, 0, 0], id="one number that rounds to zero"),
    ],
)
def test_embedding_at_the_edge_of_half_precision_is_taken(numbers: list[float]) -> None:
    validate.embedding(numbers, _HALF, "embedding")


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e5, 1e15])
def test_embedding_of_any_sensible_length_is_taken_at_single_precision(scale: float) -> None:
    validate.embedding([scale, -scale, scale, scale], _SINGLE, "embedding")


@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.sampled_from([_HALF, _SINGLE]))
def test_embedding_that_is_taken_compares_to_itself_as_equal(numbers: list[float], kind: Any) -> None:
    """With the arithmetic of the database: numbers of the stored precision, sums in float32."""
    try:
        validate.embedding(numbers, kind, "embedding")
    except InvalidArgument:
        return
    stored = np.array(numbers, np.float32).astype(np.float16 if kind is _HALF else np.float32).astype(np.float32)
    square = np.sum(stored * stored, dtype=np.float32)
    assert np.isfinite(square)
    assert square / np.sqrt(np.float64(square) * np.float64(square)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"user_id": "u" * 256}, id="a user of 256 bytes"),
        pytest.param({"user_id": "ü" * 128}, id="a user of 256 bytes in 128 characters"),
        pytest.param({"user_id": " %_\n"}, id="a user of wildcards and spaces"),
        pytest.param({"content": "x" * 65536}, id="content of 64 KiB"),
        pytest.param({"content": "€" * 21845 + "x"}, id="content of 64 KiB in fewer characters"),
        pytest.param({"content": " "}, id="content of a space"),
        pytest.param({"agent_id": "a" * 256, "session_id": "s" * 256}, id="names of 256 bytes"),
        pytest.param({"agent_id": None, "session_id": None}, id="no names"),
        pytest.param({"importance": 0.0}, id="importance 0"),
        pytest.param({"importance": 1.0}, id="importance 1"),
        pytest.param({"metadata": None}, id="no metadata"),
        pytest.param({"metadata": struct({})}, id="empty metadata"),
        pytest.param({"metadata": _sized(32768)}, id="metadata of 32 KiB"),
        pytest.param({"metadata": struct(_nested(8))}, id="metadata 8 deep"),
        pytest.param({"metadata": struct(_nested(8, lists=True))}, id="lists 8 deep"),
        pytest.param({"metadata": struct({"": 1.7976931348623157e308, "a": -5e-324})}, id="metadata of odd numbers"),
        pytest.param({"embedding": None}, id="no embedding"),
        pytest.param({"embedding_model": None}, id="no model"),
        pytest.param({"expire_time": {"seconds": 253402300799, "nanos": 999999000}}, id="the end of time"),
        pytest.param({"expire_time": {"seconds": int(time.time()) + 3600}}, id="in an hour"),
    ],
)
def test_memory_at_the_bounds_is_taken_as_it_is(changes: dict[str, Any]) -> None:
    sent = memory(**changes)
    stored = taken(sent, _HALF)
    sent.embedding_model = "model-a"
    if not sent.metadata.fields:
        sent.ClearField("metadata")  # Empty is the same as none.
    assert stored == sent


def test_what_is_left_out_gets_its_default() -> None:
    stored = taken(pb.Memory(user_id="u", content="c"), _HALF)
    assert uuid.UUID(stored.id).version == 7
    assert (stored.type, stored.importance, stored.embedding_model) == (pb.MEMORY_TYPE_EPISODIC, 0.5, "model-a")
    assert not stored.embedding
    assert not stored.HasField("expire_time")


def test_id_is_taken_in_any_case_and_kept_in_lower_case() -> None:
    upper = str(uuid.uuid4()).upper()
    assert taken(memory(id=upper), _HALF).id == upper.lower()
    assert validate.memory_id(upper, "id") == upper.lower()


def test_fields_that_only_the_server_writes_are_dropped() -> None:
    stored = taken(with_server_fields(memory()), _HALF)
    assert stored == taken(memory(), _HALF)
    assert (stored.version, stored.embedding_state) == (0, pb.EMBEDDING_STATE_UNSPECIFIED)


def test_fields_that_nobody_here_knows_are_dropped() -> None:
    newer = pb.Memory.FromString(memory().SerializeToString() + b"\xfa\x7f\x05later")  # Field 2047.
    assert b"later" in newer.SerializeToString()
    assert b"later" not in taken(newer, _HALF).SerializeToString()


def test_cluster_without_a_model_takes_the_name_of_any() -> None:
    anybodys = cluster(model="")
    assert taken(memory(embedding_model="whatever"), anybodys).embedding_model == "whatever"
    assert taken(memory(embedding_model=None), anybodys).embedding_model == ""


@given(memories(), st.sampled_from([_HALF, _SINGLE]))
def test_normal_form_is_its_own_normal_form(sent: pb.Memory, kind: Any) -> None:
    stored = taken(sent, kind)
    assert taken(stored, kind) == stored
    for name in ("user_id", "agent_id", "session_id", "content", "metadata", "embedding"):
        assert getattr(stored, name) == getattr(sent, name)
    assert stored.expire_time.ToMicroseconds() == sent.expire_time.ToMicroseconds()


# Everything but a memory.


@pytest.mark.parametrize(
    ("call", "reason", "field"),
    [
        (lambda: validate.user_id("", "user_id"), "INVALID_USER_ID", "user_id"),
        (lambda: validate.user_id("u" * 257, "user_id"), "INVALID_USER_ID", "user_id"),
        (lambda: validate.optional_user_id("\0", "user_id"), "INVALID_USER_ID", "user_id"),
        (lambda: validate.memory_id("", "id"), "INVALID_ID", "id"),
        (lambda: validate.memory_id("x", "id"), "INVALID_ID", "id"),
        (lambda: validate.request_id("r" * 257), "INVALID_REQUEST_ID", "request_id"),
        (lambda: validate.request_id("\0"), "INVALID_REQUEST_ID", "request_id"),
        (lambda: validate.page_size(-1), "OUT_OF_RANGE", "page_size"),
        (lambda: validate.page_size(1001), "OUT_OF_RANGE", "page_size"),
        (lambda: validate.window(-1, 0), "OUT_OF_RANGE", "limit"),
        (lambda: validate.window(1001, 0), "OUT_OF_RANGE", "limit"),
        (lambda: validate.window(10, -1), "OUT_OF_RANGE", "offset"),
        (lambda: validate.window(1000, 1), "OUT_OF_RANGE", "offset"),
        (lambda: validate.window(1, 1000), "OUT_OF_RANGE", "offset"),
        (lambda: validate.window(0, 991), "OUT_OF_RANGE", "offset"),
        (lambda: validate.window(1, 2**31 - 1), "OUT_OF_RANGE", "offset"),
        (lambda: validate.min_score(pb.SearchMemoriesRequest(min_score=math.nan)), "NOT_FINITE", "min_score"),
        (lambda: validate.min_score(pb.SearchMemoriesRequest(min_score=-math.inf)), "NOT_FINITE", "min_score"),
        (lambda: validate.query_text("x" * 65537), "TOO_LARGE", "query"),
        (lambda: validate.query_text("\0"), "INVALID_QUERY", "query"),
        (lambda: validate.read_options(pb.ReadOptions(level=9)), "INVALID_ENUM", "read.level"),  # type: ignore[arg-type]
    ],
)
def test_bad_argument_is_refused_with_its_reason_and_field(call: Callable[[], Any], reason: str, field: str) -> None:
    assert _fault(call) == (reason, field)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: validate.user_id("u" * 256, "user_id"), "u" * 256),
        (lambda: validate.optional_user_id("", "user_id"), ""),
        (lambda: validate.request_id(""), ""),
        (lambda: validate.request_id("r" * 256), "r" * 256),
        (lambda: validate.page_size(0), 100),
        (lambda: validate.page_size(1), 1),
        (lambda: validate.page_size(1000), 1000),
        (lambda: validate.window(0, 0), validate.Window(10, 0)),
        (lambda: validate.window(0, 990), validate.Window(10, 990)),
        (lambda: validate.window(1, 999), validate.Window(1, 999)),
        (lambda: validate.window(1000, 0), validate.Window(1000, 0)),
        (lambda: validate.window(1, 999).k, 1000),
        (lambda: validate.min_score(pb.SearchMemoriesRequest()), None),
        (lambda: validate.min_score(pb.SearchMemoriesRequest(min_score=0)), 0.0),
        (lambda: validate.min_score(pb.SearchMemoriesRequest(min_score=-1)), -1.0),
        (lambda: validate.query_text(""), ""),
        (lambda: validate.query_text("x" * 65536), "x" * 65536),
    ],
)
def test_argument_at_its_bounds_is_taken(call: Callable[[], object], expected: object) -> None:
    assert call() == expected


def test_every_read_level_is_taken() -> None:
    for level in pb.ReadLevel.values():
        validate.read_options(pb.ReadOptions(level=level, max_staleness=duration_pb2.Duration(nanos=1)))


@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.booleans())
@example([65519.996, 0.0, 0.0, 0.0], True)
@example([65520.0, 0.0, 0.0, 0.0], True)
@example([-(2.0**-25), 0.0, 0.0, 0.0], True)
@example([2.0**-25 * (1 + 2.0**-20), 0.0, 0.0, 0.0], True)
@example([math.nan, math.inf, 1.0, 1.0], True)
def test_an_embedding_is_refused_exactly_when_its_rounded_numbers_have_no_direction(
    values: list[float], half: bool
) -> None:
    array = np.array(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16) if half else array
    usable = bool(np.isfinite(array).all() and np.isfinite(rounded).all() and rounded.any())
    cluster = _HALF if half else _SINGLE
    if usable and (half or 1e-15 < np.linalg.norm(array.astype(np.float64)) < 1e18):
        validate.embedding(values, cluster, "embedding")
    else:
        with pytest.raises(InvalidArgument):
            validate.embedding(values, cluster, "embedding")
