"""The table of bad requests, and what each gets: INVALID_ARGUMENT, one field, one reason.

Some requests need a user who has memories, or a page token of another query: a `World` has these.
"""

import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from google.protobuf import duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
from google.protobuf.message import Message

from memshard.v1 import memory_pb2 as pb

DIMENSIONS = 256  # Of the local embedder's clusters; their precision is half.
_KIB = 1024
_READ_ONLY = ("id", "user_id", "version", "create_time", "update_time", "embedding_state", "embedding_model")


@dataclass(frozen=True, slots=True)
class World:
    """A user with a stored memory, and page tokens: of a listing of that user's memories, and of another cluster."""

    user: str
    memory_id: str
    page_token: str
    foreign_page_token: str


class Given(Enum):
    """Stands in a row for what only the world knows."""

    USER = "user"
    MEMORY_ID = "memory_id"
    PAGE_TOKEN = "page_token"
    FOREIGN_PAGE_TOKEN = "foreign_page_token"


_MINE: dict[str, Any] = {"user_id": Given.USER, "id": Given.MEMORY_ID}


@dataclass(frozen=True, slots=True)
class Row:
    """One bad request: its rpc and fields, and the field and reason of the answer."""

    rpc: str
    name: str
    fields: dict[str, Any]
    field: str
    reason: str

    def request(self, world: World) -> Message:
        """The request of this row in this world."""
        request: Message = getattr(pb, f"{self.rpc}Request")(**_resolved(self.fields, world))
        return request


def _resolved(value: Any, world: World) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(item, world) for key, item in value.items()}
    return getattr(world, value.value) if isinstance(value, Given) else value


@dataclass(frozen=True, slots=True)
class BadMemory:
    """What makes a memory that is otherwise good a bad one to store. `field` is its path in Memory."""

    name: str
    fields: dict[str, Any]
    field: str
    reason: str
    in_update: bool = True  # Whether an update of that field gets the same.

    def given(self) -> dict[str, Any]:
        """The fields of the bad memory."""
        return {"user_id": Given.USER, "content": "likes tea"} | self.fields

    def memory(self, user: str) -> pb.Memory:
        """The bad memory of this user, or of the bad one."""
        return pb.Memory(**({"user_id": user, "content": "likes tea"} | self.fields))


def rows() -> Iterator[Row]:
    """The whole table."""
    yield from _stores()
    yield from _updates()
    yield from _batches()
    yield from _ids_and_users()
    yield from _reads()
    yield from _pages()
    yield from _searches()


def filled(count: int, value: float) -> list[float]:
    """An embedding of so many numbers, the first of which is `value`."""
    return [value] + [1.0] * (count - 1)


def _metadata(depth: int, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Metadata of so many levels, itself counted."""
    value: Any = 1
    for _ in range(depth - 1):
        value = wrap(value)
    return {"a": value}


def _text(value: str) -> struct_pb2.Value:
    return struct_pb2.Value(string_value=value)


def _number(value: float) -> struct_pb2.Value:
    return struct_pb2.Value(number_value=value)


def _struct(value: struct_pb2.Value) -> struct_pb2.Struct:
    return struct_pb2.Struct(fields={"a": value})


_EMBEDDINGS: tuple[tuple[str, list[float], str], ...] = (
    ("too few dimensions", [1.0] * (DIMENSIONS - 1), "WRONG_DIMENSION"),
    ("too many dimensions", [1.0] * (DIMENSIONS + 1), "WRONG_DIMENSION"),
    ("NaN", filled(DIMENSIONS, math.nan), "NOT_FINITE"),
    ("infinity", filled(DIMENSIONS, math.inf), "NOT_FINITE"),
    ("minus infinity", filled(DIMENSIONS, -math.inf), "NOT_FINITE"),
    ("all zeros", [0.0] * DIMENSIONS, "ZERO_VECTOR"),
    ("zero after rounding", [1e-8] * DIMENSIONS, "ZERO_VECTOR"),
    ("beyond half's range", filled(DIMENSIONS, 65_520.0), "OUT_OF_RANGE"),
    ("far beyond half's range", filled(DIMENSIONS, -3e38), "OUT_OF_RANGE"),
)

BAD_MEMORIES: tuple[BadMemory, ...] = (
    BadMemory("empty content", {"content": ""}, "content", "INVALID_CONTENT"),
    BadMemory("content over 64 KiB", {"content": "x" * (64 * _KIB + 1)}, "content", "INVALID_CONTENT"),
    BadMemory("content over 64 KiB in bytes only", {"content": "é" * (32 * _KIB + 1)}, "content", "INVALID_CONTENT"),
    BadMemory("NUL in content", {"content": "a\0b"}, "content", "INVALID_CONTENT"),
    BadMemory("empty user", {"user_id": ""}, "user_id", "INVALID_USER_ID"),
    BadMemory("user over 256 bytes", {"user_id": "u" * 257}, "user_id", "INVALID_USER_ID"),
    BadMemory("user over 256 bytes in bytes only", {"user_id": "é" * 129}, "user_id", "INVALID_USER_ID"),
    BadMemory("NUL in user", {"user_id": "a\0b"}, "user_id", "INVALID_USER_ID"),
    BadMemory("id that is no UUID", {"id": "some-id"}, "id", "INVALID_ID"),
    BadMemory("id in braces", {"id": f"{{{uuid.UUID(int=7)}}}"}, "id", "INVALID_ID"),
    BadMemory("id without hyphens", {"id": uuid.UUID(int=7).hex}, "id", "INVALID_ID"),
    BadMemory("id and a line break", {"id": f"{uuid.UUID(int=7)}\n"}, "id", "INVALID_ID"),
    BadMemory("id of other digits", {"id": "\u0660" * 8 + "-0000-0000-0000-000000000000"}, "id", "INVALID_ID"),
    BadMemory("NUL in agent", {"agent_id": "\0"}, "agent_id", "INVALID_NAME"),
    BadMemory("agent over 256 bytes", {"agent_id": "a" * 257}, "agent_id", "INVALID_NAME"),
    BadMemory("NUL in session", {"session_id": "\0"}, "session_id", "INVALID_NAME"),
    BadMemory("session over 256 bytes", {"session_id": "a" * 257}, "session_id", "INVALID_NAME"),
    BadMemory("NUL in embedding model", {"embedding_model": "\0"}, "embedding_model", "INVALID_NAME", in_update=False),
    BadMemory("other model", {"embedding_model": "other"}, "embedding_model", "WRONG_MODEL", in_update=False),
    BadMemory("unknown type", {"type": 99}, "type", "INVALID_ENUM"),
    BadMemory("importance below 0", {"importance": -0.001}, "importance", "OUT_OF_RANGE"),
    BadMemory("importance above 1", {"importance": 1.001}, "importance", "OUT_OF_RANGE"),
    BadMemory("importance NaN", {"importance": math.nan}, "importance", "OUT_OF_RANGE"),
    BadMemory("importance infinite", {"importance": math.inf}, "importance", "OUT_OF_RANGE"),
    BadMemory("metadata over 32 KiB", {"metadata": {"a": "x" * 32 * _KIB}}, "metadata", "METADATA_TOO_LARGE"),
    BadMemory("objects 9 deep", {"metadata": _metadata(9, lambda v: {"a": v})}, "metadata", "METADATA_TOO_DEEP"),
    BadMemory("lists 9 deep", {"metadata": _metadata(9, lambda v: [v])}, "metadata", "METADATA_TOO_DEEP"),
    BadMemory("NUL in a metadata key", {"metadata": {"a\0": 1}}, "metadata", "INVALID_METADATA"),
    BadMemory("NUL in a metadata value", {"metadata": {"a": ["\0"]}}, "metadata", "INVALID_METADATA"),
    BadMemory(
        "NaN in metadata",
        {"metadata": _struct(_number(math.nan))},
        "metadata",
        "INVALID_METADATA",
    ),
    BadMemory("metadata value of no kind", {"metadata": _struct(struct_pb2.Value())}, "metadata", "INVALID_METADATA"),
    BadMemory(
        "expiry in the past", {"expire_time": timestamp_pb2.Timestamp(seconds=1)}, "expire_time", "EXPIRE_TIME_IN_PAST"
    ),
    BadMemory(
        "expiry after the year 9999",
        {"expire_time": timestamp_pb2.Timestamp(seconds=253_402_300_800)},
        "expire_time",
        "INVALID_TIMESTAMP",
    ),
    BadMemory(
        "expiry with too many nanoseconds",
        {"expire_time": timestamp_pb2.Timestamp(seconds=4_000_000_000, nanos=1_000_000_000)},
        "expire_time",
        "INVALID_TIMESTAMP",
    ),
    *(BadMemory(f"embedding: {name}", {"embedding": v}, "embedding", reason) for name, v, reason in _EMBEDDINGS),
)


_REQUEST_IDS = (("request id over 256 bytes", "r" * 257), ("NUL in request id", "a\0b"))
_IDS = (("no id", ""), ("bad id", "some-id"), ("id of 100 kB", "0" * 100_000))
_USERS = (("no user", ""), ("user over 256 bytes", "u" * 257), ("NUL in user", "a\0b"))


def _stores() -> Iterator[Row]:
    for bad in BAD_MEMORIES:
        yield Row("StoreMemory", bad.name, {"memory": bad.given()}, f"memory.{bad.field}", bad.reason)
    yield Row("StoreMemory", "nothing", {}, "memory.user_id", "INVALID_USER_ID")


def _updates() -> Iterator[Row]:
    rpc = "UpdateMemory"
    for bad in BAD_MEMORIES:
        if bad.in_update:
            mask = _mask("content" if bad.field in {"id", "user_id"} else bad.field)
            memory = {"id": Given.MEMORY_ID} | bad.given()
            yield Row(rpc, bad.name, {"memory": memory, "update_mask": mask}, f"memory.{bad.field}", bad.reason)
    memory = _MINE | {"content": "likes coffee"}
    masks = [[], [""], ["nothing"], ["*"], ["metadata.topic"], ["memory.content"], ["content", "nothing"], ["Content"]]
    masks += [[name] for name in _READ_ONLY] + [["x" * 100_000], ["a\0b"], ["tea 茶\n"]]
    for paths in masks:
        fields = {"memory": memory, "update_mask": _mask(*paths)}
        yield Row(rpc, f"mask {','.join(paths)[:30]!r}", fields, "update_mask", "INVALID_UPDATE_MASK")
    good = {"memory": memory, "update_mask": _mask("content")}
    for version in (0, -1, -(2**63)):
        fields = good | {"expected_version": version}
        yield Row(rpc, f"expected version {version}", fields, "expected_version", "OUT_OF_RANGE")
    for name, value in _REQUEST_IDS:
        yield Row(rpc, name, good | {"request_id": value}, "request_id", "INVALID_REQUEST_ID")


def _mask(*paths: str) -> field_mask_pb2.FieldMask:
    return field_mask_pb2.FieldMask(paths=paths)


def _batches() -> Iterator[Row]:
    def batch(count: int, size: int = 9) -> dict[str, Any]:
        return {"memories": [{"user_id": "nobody", "content": f"{n:09}".ljust(size, "x")} for n in range(count)]}

    rpc = "BatchStoreMemories"
    yield Row(rpc, "batch of 0", {}, "memories", "BATCH_SIZE")
    yield Row(rpc, "batch of 501", batch(501), "memories", "BATCH_SIZE")
    yield Row(rpc, "batch of 9 MiB", batch(144, 64 * _KIB), "memories", "TOO_LARGE")


def _ids_and_users() -> Iterator[Row]:
    for rpc in ("GetMemory", "DeleteMemory", "ListMemoryVersions"):
        for name, value in _IDS:
            yield Row(rpc, name, _MINE | {"id": value}, "id", "INVALID_ID")
    for rpc in ("GetMemory", "DeleteMemory", "ListMemoryVersions", "EraseUser", "ListMemories", "SearchMemories"):
        others: dict[str, Any] = {"query": "tea"} if rpc == "SearchMemories" else {}
        if rpc in {"GetMemory", "DeleteMemory", "ListMemoryVersions"}:
            others = {"id": Given.MEMORY_ID}
        for name, value in _USERS:
            if value or rpc not in {"GetMemory", "SearchMemories"}:  # Where nobody means everybody.
                yield Row(rpc, name, others | {"user_id": value}, "user_id", "INVALID_USER_ID")
    for name, value in _REQUEST_IDS:
        yield Row("DeleteMemory", name, _MINE | {"request_id": value}, "request_id", "INVALID_REQUEST_ID")
        fields = {"user_id": "nobody", "request_id": value}
        yield Row("EraseUser", name, fields, "request_id", "INVALID_REQUEST_ID")


def _reads() -> Iterator[Row]:
    """What is the same for all reads that say how fresh, and for all that take filters."""
    asked: dict[str, dict[str, Any]] = {
        "GetMemory": _MINE,
        "ListMemories": {"user_id": Given.USER},
        "SearchMemories": {"user_id": Given.USER, "query": "tea"},
    }
    for rpc, fields in asked.items():
        for name, read, field, reason in _READS:
            yield Row(rpc, name, fields | {"read": read}, field, reason)
    for rpc in ("ListMemories", "SearchMemories"):
        for name, filter, field, reason in _FILTERS:
            yield Row(rpc, name, asked[rpc] | {"filter": filter}, field, reason)


_READS: tuple[tuple[str, pb.ReadOptions, str, str], ...] = (
    ("unknown read level", pb.ReadOptions(level=99), "read.level", "INVALID_ENUM"),  # type: ignore[arg-type]
    (
        "bounded staleness without a bound",
        pb.ReadOptions(level=pb.READ_LEVEL_BOUNDED_STALENESS),
        "read.max_staleness",
        "MAX_STALENESS_REQUIRED",
    ),
    (
        "bounded staleness of nothing",
        pb.ReadOptions(level=pb.READ_LEVEL_BOUNDED_STALENESS, max_staleness=duration_pb2.Duration()),
        "read.max_staleness",
        "MAX_STALENESS_REQUIRED",
    ),
    (
        "negative staleness",
        pb.ReadOptions(max_staleness=duration_pb2.Duration(seconds=-1)),
        "read.max_staleness",
        "OUT_OF_RANGE",
    ),
    (
        "staleness with too many nanoseconds",
        pb.ReadOptions(max_staleness=duration_pb2.Duration(nanos=1_000_000_000)),
        "read.max_staleness",
        "OUT_OF_RANGE",
    ),
    (
        "made-up consistency token",
        pb.ReadOptions(consistency_tokens=[b"made up"]),
        "read.consistency_tokens",
        "BAD_CONSISTENCY_TOKEN",
    ),
    (
        "65 consistency tokens",
        pb.ReadOptions(consistency_tokens=[b"x"] * 65),
        "read.consistency_tokens",
        "OUT_OF_RANGE",
    ),
)


def _compare(field: str, operator: int, value: struct_pb2.Value) -> pb.Filter:
    return pb.Filter(comparison=pb.Comparison(field=field, operator=operator, value=value))  # type: ignore[arg-type]


_TEA = _compare("metadata.topic", pb.OPERATOR_EQ, struct_pb2.Value(string_value="tea"))


def _negated(times: int) -> pb.Filter:
    filter = _TEA
    for _ in range(times):
        filter = pb.Filter(negation=filter)
    return filter


def _list(*values: struct_pb2.Value) -> struct_pb2.Value:
    return struct_pb2.Value(list_value=struct_pb2.ListValue(values=values))


_AT = "filter.comparison"
_FILTERS: tuple[tuple[str, pb.Filter, str, str], ...] = (
    ("filter of nothing", pb.Filter(), "filter", "INVALID_FILTER"),
    ("filter all of nothing", pb.Filter(all_of=pb.FilterList()), "filter.all_of.filters", "INVALID_FILTER"),
    ("filter any of nothing", pb.Filter(any_of=pb.FilterList()), "filter.any_of.filters", "INVALID_FILTER"),
    ("filter 9 deep", _negated(8), "filter" + ".negation" * 8, "FILTER_TOO_DEEP"),
    ("filter of 65 comparisons", pb.Filter(any_of=pb.FilterList(filters=[_TEA] * 65)), "filter", "FILTER_TOO_LARGE"),
    ("filter by content", _compare("content", pb.OPERATOR_EQ, _text("x")), f"{_AT}.field", "UNKNOWN_FILTER_FIELD"),
    ("filter by nothing", _compare("", pb.OPERATOR_EQ, _text("x")), f"{_AT}.field", "UNKNOWN_FILTER_FIELD"),
    (
        "filter by 50 kB of field",
        _compare("x" * 50_000, pb.OPERATOR_EQ, _text("x")),
        f"{_AT}.field",
        "UNKNOWN_FILTER_FIELD",
    ),
    (
        "filter by all metadata",
        _compare("metadata", pb.OPERATOR_EQ, _text("x")),
        f"{_AT}.field",
        "UNKNOWN_FILTER_FIELD",
    ),
    ("filter by an empty key", _compare("metadata..a", pb.OPERATOR_EQ, _text("x")), f"{_AT}.field", "INVALID_FILTER"),
    ("NUL in a filter's field", _compare("metadata.\0", pb.OPERATOR_EQ, _text("x")), f"{_AT}.field", "INVALID_FILTER"),
    ("filter by no operator", _compare("metadata.a", 0, _text("x")), f"{_AT}.operator", "UNKNOWN_OPERATOR"),
    ("filter by operator 99", _compare("metadata.a", 99, _text("x")), f"{_AT}.operator", "UNKNOWN_OPERATOR"),
    ("filter by type > x", _compare("type", pb.OPERATOR_GT, _text("x")), f"{_AT}.operator", "WRONG_FILTER_TYPE"),
    (
        "filter importance = text",
        _compare("importance", pb.OPERATOR_EQ, _text("0.5")),
        f"{_AT}.value",
        "WRONG_FILTER_TYPE",
    ),
    ("filter agent = 7", _compare("agent_id", pb.OPERATOR_EQ, _number(7)), f"{_AT}.value", "WRONG_FILTER_TYPE"),
    ("filter type = dream", _compare("type", pb.OPERATOR_EQ, _text("DREAM")), f"{_AT}.value", "WRONG_FILTER_TYPE"),
    (
        "filter time > yesterday",
        _compare("create_time", pb.OPERATOR_GT, _text("yesterday")),
        f"{_AT}.value",
        "WRONG_FILTER_TYPE",
    ),
    (
        "filter time on 30 February",
        _compare("create_time", pb.OPERATOR_GT, _text("2030-02-30T00:00:00Z")),
        f"{_AT}.value",
        "WRONG_FILTER_TYPE",
    ),
    (
        "filter metadata > true",
        _compare("metadata.a", pb.OPERATOR_GT, struct_pb2.Value(bool_value=True)),
        f"{_AT}.value",
        "WRONG_FILTER_TYPE",
    ),
    (
        "filter in a text",
        _compare("metadata.a", pb.OPERATOR_IN, _text("abc")),
        f"{_AT}.value",
        "WRONG_FILTER_TYPE",
    ),
    ("filter in nothing", _compare("metadata.a", pb.OPERATOR_IN, _list()), f"{_AT}.value", "WRONG_FILTER_TYPE"),
    (
        "filter in a list of two kinds",
        _compare("metadata.a", pb.OPERATOR_NOT_IN, _list(_number(1), _text("a"))),
        f"{_AT}.value.list_value.values[1]",
        "WRONG_FILTER_TYPE",
    ),
    (
        "filter in 257 values",
        _compare("metadata.a", pb.OPERATOR_IN, _list(*[_number(1)] * 257)),
        f"{_AT}.value",
        "FILTER_TOO_LARGE",
    ),
    (
        "filter with 64 KiB of text",
        _compare("metadata.a", pb.OPERATOR_EQ, _text("x" * (64 * _KIB + 1))),
        f"{_AT}.value",
        "FILTER_TOO_LARGE",
    ),
    (
        "filter without a value",
        _compare("metadata.a", pb.OPERATOR_EQ, struct_pb2.Value()),
        f"{_AT}.value",
        "WRONG_FILTER_TYPE",
    ),
    ("NUL in a filter's value", _compare("metadata.a", pb.OPERATOR_EQ, _text("\0")), f"{_AT}.value", "INVALID_FILTER"),
    ("NaN in a filter", _compare("metadata.a", pb.OPERATOR_LT, _number(math.nan)), f"{_AT}.value", "INVALID_FILTER"),
)


def _pages() -> Iterator[Row]:
    listing: dict[str, Any] = {"user_id": Given.USER}
    for size in (-1, 1001, 2**31 - 1):
        for rpc, fields in (("ListMemories", listing), ("ListMemoryVersions", _MINE)):
            yield Row(rpc, f"page of {size}", fields | {"page_size": size}, "page_size", "OUT_OF_RANGE")
    bad: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("ListMemories", "made-up page token", {"page_token": "made up"}),
        ("ListMemories", "page token that is not ASCII", {"page_token": "茶"}),
        ("ListMemories", "page token of a megabyte", {"page_token": "A" * 10**6}),
        ("ListMemories", "page token of another cluster", {"page_token": Given.FOREIGN_PAGE_TOKEN}),
        ("ListMemories", "page token of another user", {"page_token": Given.PAGE_TOKEN, "user_id": "nobody"}),
        ("ListMemories", "page token of another filter", {"page_token": Given.PAGE_TOKEN, "filter": _TEA}),
        ("ListMemories", "page token of another view", {"page_token": Given.PAGE_TOKEN, "include_embedding": True}),
        ("ListMemoryVersions", "made-up page token", {"page_token": "made up", "id": Given.MEMORY_ID}),
        ("ListMemoryVersions", "page token of a listing", {"page_token": Given.PAGE_TOKEN, "id": Given.MEMORY_ID}),
    )
    for rpc, name, fields in bad:
        yield Row(rpc, name, listing | fields, "page_token", "BAD_PAGE_TOKEN")


def _searches() -> Iterator[Row]:
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("neither query nor embedding", {}, "query", "EMPTY_QUERY"),
        ("keywords of nothing", {"mode": pb.SEARCH_MODE_KEYWORD}, "query", "EMPTY_QUERY"),
        (
            "keywords by embedding",
            {"mode": pb.SEARCH_MODE_KEYWORD, "embedding": [1.0] * DIMENSIONS},
            "query",
            "EMPTY_QUERY",
        ),
        ("query over 64 KiB", {"query": "x" * (64 * _KIB + 1)}, "query", "TOO_LARGE"),
        ("NUL in query", {"query": "a\0b"}, "query", "INVALID_QUERY"),
        ("NUL in keywords", {"query": "a\0b", "mode": pb.SEARCH_MODE_KEYWORD}, "query", "INVALID_QUERY"),
        ("limit -1", {"query": "tea", "limit": -1}, "limit", "OUT_OF_RANGE"),
        ("limit 1001", {"query": "tea", "limit": 1001}, "limit", "OUT_OF_RANGE"),
        ("offset -1", {"query": "tea", "offset": -1}, "offset", "OUT_OF_RANGE"),
        ("offset + limit 1001", {"query": "tea", "offset": 501, "limit": 500}, "offset", "OUT_OF_RANGE"),
        ("offset + default limit 1001", {"query": "tea", "offset": 991}, "offset", "OUT_OF_RANGE"),
        ("offset at the end of int32", {"query": "tea", "offset": 2**31 - 1}, "offset", "OUT_OF_RANGE"),
        ("least score NaN", {"query": "tea", "min_score": math.nan}, "min_score", "NOT_FINITE"),
        ("least score infinite", {"query": "tea", "min_score": math.inf}, "min_score", "NOT_FINITE"),
        ("unknown mode", {"query": "tea", "mode": 99}, "mode", "INVALID_ENUM"),
    ]
    cases += [(f"embedding: {name}", {"embedding": value}, "embedding", reason) for name, value, reason in _EMBEDDINGS]
    for name, fields, field, reason in cases:
        yield Row("SearchMemories", name, fields, field, reason)
