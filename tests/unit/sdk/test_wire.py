"""Arguments to requests and responses to results: nothing is lost on the way, and what would be is refused."""

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from memshard import (
    UNSET,
    AlreadyExists,
    DegradationLevel,
    Durability,
    EmbeddingState,
    InternalError,
    InvalidArgument,
    Memory,
    MemoryPage,
    MemoryType,
    NewMemory,
    ScoreKind,
    SearchMode,
    Unavailable,
    _values,
    _wire,
)
from memshard.v1 import memory_pb2 as pb
from tests.unit.sdk.server import info, status

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)


def _store(**fields: Any) -> pb.Memory:
    arguments: dict[str, Any] = {
        "user_id": "alice",
        "content": "likes tea",
        "id": None,
        "agent_id": "",
        "session_id": "",
        "type": MemoryType.EPISODIC,
        "metadata": None,
        "importance": None,
        "embedding": None,
        "embedding_model": "",
        "expire_time": None,
    }
    return _wire.store_request(**(arguments | fields)).memory


def _search(**fields: Any) -> pb.SearchMemoriesRequest:
    arguments: dict[str, Any] = {
        "query": "",
        "user_id": None,
        "embedding": None,
        "limit": 10,
        "offset": 0,
        "filter": None,
        "mode": SearchMode.SEMANTIC,
        "min_score": None,
        "require_all_shards": False,
        "include_embedding": False,
    }
    return _wire.search_request(**(arguments | fields))


def _update(**fields: Any) -> pb.UpdateMemoryRequest:
    changes = ("content", "metadata", "importance", "type", "agent_id", "session_id", "embedding", "expire_time")
    arguments: dict[str, Any] = {
        "user_id": "alice",
        "id": "some-id",
        **dict.fromkeys(changes, UNSET),
        "expected_version": None,
        "request_id": None,
    }
    return _wire.update_request(**(arguments | fields))


@given(st.dictionaries(_TEXT, _JSON, max_size=5))
def test_metadata_survives_the_wire(metadata: dict[str, Any]) -> None:
    sent = _values.struct_from_metadata(metadata).SerializeToString()
    assert _values.metadata_from_struct(struct_pb2.Struct.FromString(sent)) == metadata


def test_numbers_without_a_fraction_come_back_as_int() -> None:
    back = _values.metadata_from_struct(_values.struct_from_metadata({"n": 3, "x": 2.5, "big": 1e300, "yes": True}))
    assert back == {"n": 3, "x": 2.5, "big": 1e300, "yes": True}
    assert {key: type(value) for key, value in back.items()} == {"n": int, "x": float, "big": float, "yes": bool}
    assert list(back) == sorted(back)


@pytest.mark.parametrize(
    ("metadata", "path"),
    [
        ({"a": {"b": [1, object()]}}, "metadata.a.b[1]"),
        ({"a": 2**53 + 1}, "metadata.a"),
        ({"a": math.nan}, "metadata.a"),
        ({"a": b"bytes"}, "metadata.a"),
        ({"a": "\ud800"}, "metadata.a"),
        ({1: "a"}, "metadata"),
        (["a"], "metadata"),
    ],
)
def test_metadata_that_the_wire_would_change_is_refused_by_path(metadata: Any, path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _values.struct_from_metadata(metadata)
    assert [violation.field for violation in caught.value.field_violations] == [path]


def test_metadata_that_holds_itself_is_refused() -> None:
    metadata: dict[str, Any] = {}
    metadata["self"] = metadata
    with pytest.raises(InvalidArgument, match="deep"):
        _values.struct_from_metadata(metadata)


@given(
    st.builds(
        Memory,
        id=st.uuids().map(str),
        user_id=_TEXT,
        content=_TEXT,
        type=st.sampled_from(MemoryType),
        agent_id=_TEXT,
        session_id=_TEXT,
        metadata=st.dictionaries(_TEXT, _JSON, max_size=3),
        importance=st.none() | st.integers(0, 100).map(lambda percent: percent / 100),
        embedding=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)).map(tuple),
        embedding_model=_TEXT,
        expire_time=st.none() | st.datetimes(timezones=st.just(UTC)),
    )
)
def test_what_is_stored_is_what_is_read(memory: Memory) -> None:
    stored = _store(
        id=memory.id,
        user_id=memory.user_id,
        content=memory.content,
        type=memory.type,
        agent_id=memory.agent_id,
        session_id=memory.session_id,
        metadata=memory.metadata,
        importance=memory.importance,
        embedding=memory.embedding,
        embedding_model=memory.embedding_model,
        expire_time=memory.expire_time,
    )
    assert _wire.memory(pb.Memory.FromString(stored.SerializeToString())) == memory


def test_store_makes_an_id_and_keeps_a_given_one() -> None:
    assert _store().id != _store().id
    assert _store(id="given").id == "given"


def test_delete_makes_a_request_id() -> None:
    assert len(_wire.delete_request(user_id="u", id="i", request_id=None).request_id) == 36
    assert _wire.delete_request(user_id="u", id="i", request_id="mine").request_id == "mine"


def test_erase_makes_a_request_id() -> None:
    assert len(_wire.erase_request(user_id="u", request_id=None).request_id) == 36
    assert _wire.erase_request(user_id="u", request_id="mine").request_id == "mine"


def test_update_masks_what_is_given_and_nothing_else() -> None:
    request = _update(content="likes coffee", importance=0.0, metadata={}, expected_version=2**40)
    assert list(request.update_mask.paths) == ["content", "metadata", "importance"]
    assert (request.memory.content, request.memory.importance, request.expected_version) == ("likes coffee", 0.0, 2**40)
    assert len(request.request_id) == 36
    whole = _update(
        content="c",
        metadata={"a": 1},
        importance=1,
        type=MemoryType.SEMANTIC,
        agent_id="",
        session_id="s",
        embedding=[1.0],
        expire_time=datetime(2030, 1, 1, tzinfo=UTC),
        request_id="mine",
    )
    assert set(whole.update_mask.paths) <= {field.name for field in pb.Memory.DESCRIPTOR.fields}
    assert len(whole.update_mask.paths) == 8
    assert not whole.HasField("expected_version")
    assert whole.request_id == "mine"


def test_update_with_none_clears_the_expiry() -> None:
    request = _update(expire_time=None)
    assert list(request.update_mask.paths) == ["expire_time"]
    assert not request.memory.HasField("expire_time")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "update_mask"),
        ({"content": None}, "content"),
        ({"metadata": None}, "metadata"),
        ({"importance": None}, "importance"),
        ({"expire_time": datetime(2030, 1, 1)}, "expire_time"),
        ({"content": "c", "expected_version": 0}, "expected_version"),
        ({"content": "c", "expected_version": 2**63}, "expected_version"),
    ],
)
def test_update_argument_that_is_wrong_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _update(**fields)
    assert [violation.field for violation in caught.value.field_violations] == [field]


def test_new_memories_have_their_ids_from_the_start() -> None:
    memories = [NewMemory("alice", "likes tea"), NewMemory("bob", "likes coffee", id="given")]
    first, again = _wire.batch_request(iter(memories)), _wire.batch_request(memories)
    assert first == again
    assert [memory.id for memory in first.memories] == [memories[0].id, "given"]
    assert len(memories[0].id) == 36


def test_batch_is_the_stores_of_its_memories() -> None:
    fields: dict[str, Any] = {"content": "x", "metadata": {"a": 1}, "importance": 0.25, "embedding": [1.0], "id": "i"}
    assert list(_wire.batch_request([NewMemory("alice", **fields)]).memories) == [_store(**fields)]


@pytest.mark.parametrize(
    ("memory", "field"),
    [
        (NewMemory("alice", "\ud800"), "memories[1].content"),
        (NewMemory("alice", "x", metadata={"a": [object()]}), "memories[1].metadata.a[0]"),
        (NewMemory("alice", "x", expire_time=datetime(2030, 1, 1)), "memories[1].expire_time"),
        ("likes tea", "memories[1]"),
    ],
)
def test_memory_of_a_batch_that_cannot_be_sent_is_refused_by_its_place(memory: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _wire.batch_request([NewMemory("alice", "likes tea"), memory])
    assert [violation.field for violation in caught.value.field_violations] == [field]


def test_what_was_deleted_since_it_was_stored_is_told_from_a_trailer() -> None:
    request = _wire.batch_request([NewMemory("alice", text, id=str(n)) for n, text in enumerate("abcd")])
    response = pb.BatchStoreMemoriesResponse(results=[pb.BatchStoreResult(id=str(n)) for n in range(4)])
    trailers: list[tuple[str, str | bytes]] = [
        ("other", b"\xff"),
        ("memshard-deleted", "1,3"),
        ("memshard-deleted", "garbage,"),
    ]
    result = _wire.batch_result(request, response, trailers)
    assert [outcome.deleted for outcome in result.outcomes] == [False, True, False, True]
    assert _wire.store_result(pb.StoreMemoryResponse(), [("memshard-deleted", "0")]).deleted
    assert not _wire.store_result(pb.StoreMemoryResponse(), []).deleted


def test_batch_result_says_what_became_of_each() -> None:
    request = _wire.batch_request([NewMemory("alice", "a", id="1"), NewMemory("alice", "b", id="2")])
    taken = status(grpc.StatusCode.ALREADY_EXISTS, "taken", info("ID_TAKEN"))
    response = pb.BatchStoreMemoriesResponse(results=[pb.BatchStoreResult(id="1"), pb.BatchStoreResult(error=taken)])
    result = _wire.batch_result(request, response)
    assert [(outcome.id, type(outcome.error)) for outcome in result.outcomes] == [
        ("1", type(None)),
        ("2", AlreadyExists),
    ]
    assert result.failed == result.outcomes[1:]
    del response.results[1]
    with pytest.raises(InternalError):
        _wire.batch_result(request, response)


def test_embedding_may_be_any_sequence_or_array() -> None:
    for embedding in ([1, 2.5], (1.0, 2.5), np.array([1, 2.5], dtype="f4"), np.array([1, 2.5])):
        assert list(_store(embedding=embedding).embedding) == [1.0, 2.5]
        assert list(_search(embedding=embedding).embedding) == [1.0, 2.5]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"content": "\ud800"}, "content"),
        ({"content": b"bytes"}, "content"),
        ({"embedding": [[1.0]]}, "embedding"),
        ({"embedding": np.ones((2, 2))}, "embedding"),
        ({"embedding": "1.0"}, "embedding"),
        ({"embedding": 1.0}, "embedding"),
        ({"embedding": [10**400]}, "embedding"),
        ({"importance": "high"}, "importance"),
        ({"importance": 10**400}, "importance"),
        ({"expire_time": datetime(2030, 1, 1)}, "expire_time"),
    ],
)
def test_store_argument_of_the_wrong_kind_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        _store(**fields)
    assert isinstance(caught.value, InvalidArgument)


def test_empty_user_never_means_everybody() -> None:
    assert _search(user_id=None).user_id == ""
    with pytest.raises(InvalidArgument, match="user_id"):
        _search(user_id="")
    with pytest.raises(InvalidArgument, match="user_id"):
        _wire.get_request(id="i", user_id="", include_embedding=False)


@pytest.mark.parametrize("fields", [{"limit": 0}, {"limit": 2**31}, {"limit": True}, {"offset": -1}, {"limit": 1.5}])
def test_counts_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        _search(**fields)


def test_min_score_of_zero_is_sent() -> None:
    assert _search(min_score=0.0).HasField("min_score")
    assert not _search().HasField("min_score")


def test_times_of_other_zones_are_the_same_instant() -> None:
    instant = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    back = _values.from_timestamp(_values.timestamp("expire_time", instant))
    assert back == instant
    assert back.tzinfo is UTC


def test_unknown_enum_values_of_newer_servers_read_as_unspecified() -> None:
    memory = _wire.memory(pb.Memory(type=99, embedding_state=99))  # type: ignore[arg-type]
    assert memory.type is MemoryType.UNSPECIFIED
    assert memory.embedding_state is EmbeddingState.UNSPECIFIED


@pytest.mark.parametrize("enum", [MemoryType, EmbeddingState, Durability, DegradationLevel, ScoreKind, SearchMode])
def test_enums_match_the_contract(enum: Any) -> None:
    wire = getattr(pb, enum.__name__).items()
    prefix = next(name for name, number in wire if number == 0).removesuffix("UNSPECIFIED")
    assert {name.removeprefix(prefix): number for name, number in wire} == {m.name: m.value for m in enum}


def test_search_result_tells_what_is_missing() -> None:
    failure = status(grpc.StatusCode.UNAVAILABLE, "no route", info("OUTCOME_UNKNOWN"))
    response = pb.SearchMemoriesResponse(
        results=[pb.ScoredMemory(memory=pb.Memory(id="a", content="x"), score=0.5)],
        score_kind=pb.SCORE_KIND_COSINE,
        report=pb.ReadReport(
            served_by=["primary"],
            shards=pb.ShardSummary(total=3, succeeded=2, failed=[pb.ShardFailure(shard_id="s-2", status=failure)]),
            degradation_level=pb.DEGRADATION_LEVEL_NORMAL,
        ),
    )
    result = _wire.search_result(response)
    assert result.score_kind is ScoreKind.COSINE
    assert [(scored.memory.id, scored.score) for scored in result.results] == [("a", 0.5)]
    assert result.report.partial
    assert result.report.shards.failed[0].shard_id == "s-2"
    assert isinstance(result.report.shards.failed[0].error, Unavailable)
    assert result.report.shards.failed[0].error.reason == "OUTCOME_UNKNOWN"


def test_iteration_refuses_a_partial_page() -> None:
    def page(total: int, succeeded: int) -> MemoryPage:
        shards = pb.ShardSummary(total=total, succeeded=succeeded)
        return _wire.list_result(pb.ListMemoriesResponse(report=pb.ReadReport(shards=shards)))

    assert _wire.whole_page(page(1, 1)) == page(1, 1)
    with pytest.raises(Unavailable, match="1 of 2 shards"):
        _wire.whole_page(page(2, 1))
