"""Requests from arguments, results from responses: pure functions, which both clients share so as not to diverge."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final, TypeAlias

from google.protobuf import field_mask_pb2

from memshard import _values
from memshard.errors import InternalError, Unavailable, from_status, invalid
from memshard.filters import Filter
from memshard.ids import new_id
from memshard.types import (
    UNSET,
    BatchOutcome,
    BatchResult,
    DegradationLevel,
    DeleteResult,
    Durability,
    Embedding,
    EmbeddingState,
    EraseResult,
    GetResult,
    Memory,
    MemoryPage,
    MemoryType,
    Metadata,
    NewMemory,
    ReadReport,
    ScoredMemory,
    ScoreKind,
    SearchMode,
    SearchResult,
    ShardFailure,
    ShardSummary,
    StoreResult,
    Unset,
    UpdateResult,
    VersionPage,
    WriteReceipt,
)
from memshard.v1 import memory_pb2 as pb

# Pairs that come behind an answer, for what the contract has no field for.
Trailers: TypeAlias = "Iterable[tuple[str, str | bytes]] | None"

# The items of a store that were stored before and have been deleted since: their numbers, with commas.
_DELETED_TRAILER: Final = "memshard-deleted"
# The level at which versions were listed, in words, as their answer has no report.
_LEVEL_TRAILER: Final = "memshard-degradation-level"

_UPDATABLE: Final = (
    "content",
    "metadata",
    "importance",
    "type",
    "agent_id",
    "session_id",
    "embedding",
    "expire_time",
)


def store_request(  # noqa: PLR0913 - Each argument is a field of the memory.
    *,
    user_id: str,
    content: str,
    id: str | None,
    agent_id: str,
    session_id: str,
    type: MemoryType,
    metadata: Metadata | None,
    importance: float | None,
    embedding: Embedding | None,
    embedding_model: str,
    expire_time: datetime | None,
) -> pb.StoreMemoryRequest:
    """A store of one memory. Its id is made here, once, so that every attempt to send it has the same."""
    memory = NewMemory(
        user_id=user_id,
        content=content,
        id=new_id() if id is None else id,
        agent_id=agent_id,
        session_id=session_id,
        type=type,
        metadata=metadata,
        importance=importance,
        embedding=embedding,
        embedding_model=embedding_model,
        expire_time=expire_time,
    )
    return pb.StoreMemoryRequest(memory=_new_memory(memory))


def batch_request(memories: Iterable[NewMemory]) -> pb.BatchStoreMemoriesRequest:
    """A store of many memories, which have their ids."""
    request = pb.BatchStoreMemoriesRequest()
    for index, memory in enumerate(memories):
        if not isinstance(memory, NewMemory):
            raise invalid(f"memories[{index}]", f"must be a NewMemory, not {type(memory).__name__}")
        request.memories.append(_new_memory(memory, f"memories[{index}]."))
    return request


def update_request(  # noqa: PLR0913 - Each argument is a field of the request.
    *,
    user_id: str,
    id: str,
    content: str | Unset,
    metadata: Metadata | Unset,
    importance: float | Unset,
    type: MemoryType | Unset,
    agent_id: str | Unset,
    session_id: str | Unset,
    embedding: Embedding | Unset,
    expire_time: datetime | Unset | None,
    expected_version: int | None,
    request_id: str | None,
) -> pb.UpdateMemoryRequest:
    """A change of the fields that are given. Its request id is made here, once, so that a retry has the one effect."""
    memory = pb.Memory(id=_values.text("id", id), user_id=_values.text("user_id", user_id))
    for field, text in (("content", content), ("agent_id", agent_id), ("session_id", session_id)):
        if text is not UNSET:
            setattr(memory, field, _values.text(field, text))
    if metadata is not UNSET:
        memory.metadata.CopyFrom(_values.struct_from_metadata(metadata))
    if importance is not UNSET:
        memory.importance = _values.number("importance", importance)
    if type is not UNSET:
        memory.type = pb.MemoryType.ValueType(MemoryType(type))
    if embedding is not UNSET:
        _values.fill_floats("embedding", memory.embedding, embedding)
    if expire_time is not UNSET and expire_time is not None:
        memory.expire_time.CopyFrom(_values.timestamp("expire_time", expire_time))
    given = (content, metadata, importance, type, agent_id, session_id, embedding, expire_time)
    mask = [field for field, value in zip(_UPDATABLE, given, strict=True) if value is not UNSET]
    if not mask:
        raise invalid("update_mask", "names nothing: give at least one field to change")
    return pb.UpdateMemoryRequest(
        memory=memory,
        update_mask=field_mask_pb2.FieldMask(paths=mask),
        expected_version=(
            None if expected_version is None else _values.count("expected_version", expected_version, least=1, bits=64)
        ),
        request_id=_request_id(request_id),
    )


def get_request(*, id: str, user_id: str | None, include_embedding: bool) -> pb.GetMemoryRequest:
    """A fetch by id, from one user or, with user_id None, from whoever has it."""
    return pb.GetMemoryRequest(
        id=_values.text("id", id), user_id=_one_or_all(user_id), include_embedding=include_embedding
    )


def delete_request(*, user_id: str, id: str, request_id: str | None) -> pb.DeleteMemoryRequest:
    """A delete. Its request id is made here, once, so that a retry has the same one effect and answer."""
    return pb.DeleteMemoryRequest(
        id=_values.text("id", id),
        user_id=_values.text("user_id", user_id),
        request_id=_request_id(request_id),
    )


def list_request(
    *, user_id: str, filter: Filter | None, page_size: int, page_token: str, include_embedding: bool
) -> pb.ListMemoriesRequest:
    """One page of a listing. A size of 0, the wire's word for its default, is what nobody means who says it here."""
    return pb.ListMemoriesRequest(
        user_id=_values.text("user_id", user_id),
        filter=_filter(filter),
        page_size=_values.count("page_size", page_size, least=1),
        page_token=_values.text("page_token", page_token),
        include_embedding=include_embedding,
    )


def versions_request(*, user_id: str, id: str, page_size: int, page_token: str) -> pb.ListMemoryVersionsRequest:
    """One page of a memory's versions."""
    return pb.ListMemoryVersionsRequest(
        id=_values.text("id", id),
        user_id=_values.text("user_id", user_id),
        page_size=_values.count("page_size", page_size, least=1),
        page_token=_values.text("page_token", page_token),
    )


def erase_request(*, user_id: str, request_id: str | None) -> pb.EraseUserRequest:
    """An erasure of all that is a user's. Its request id is made here, once, so that a retry has the same answer."""
    return pb.EraseUserRequest(user_id=_values.text("user_id", user_id), request_id=_request_id(request_id))


def search_request(  # noqa: PLR0913 - Each argument is a field of the request.
    *,
    query: str,
    user_id: str | None,
    embedding: Embedding | None,
    limit: int,
    offset: int,
    filter: Filter | None,
    mode: SearchMode,
    min_score: float | None,
    require_all_shards: bool,
    include_embedding: bool,
) -> pb.SearchMemoriesRequest:
    """A search in one user's memories or, with user_id None, in everybody's."""
    request = pb.SearchMemoriesRequest(
        user_id=_one_or_all(user_id),
        query=_values.text("query", query),
        limit=_values.count("limit", limit, least=1),
        offset=_values.count("offset", offset, least=0),
        filter=_filter(filter),
        mode=pb.SearchMode.ValueType(SearchMode(mode)),
        min_score=None if min_score is None else _values.number("min_score", min_score),
        require_all_shards=require_all_shards,
        include_embedding=include_embedding,
    )
    if embedding is not None:
        _values.fill_floats("embedding", request.embedding, embedding)
    return request


def memory(message: pb.Memory) -> Memory:
    """The memory in a message."""
    return Memory(
        id=message.id,
        user_id=message.user_id,
        content=message.content,
        type=MemoryType(message.type),
        agent_id=message.agent_id,
        session_id=message.session_id,
        metadata=_values.metadata_from_struct(message.metadata),
        importance=_values.shortest_float(message.importance) if message.HasField("importance") else None,
        embedding=tuple(message.embedding),
        embedding_model=message.embedding_model,
        embedding_state=EmbeddingState(message.embedding_state),
        create_time=_values.from_timestamp(message.create_time) if message.HasField("create_time") else None,
        update_time=_values.from_timestamp(message.update_time) if message.HasField("update_time") else None,
        expire_time=_values.from_timestamp(message.expire_time) if message.HasField("expire_time") else None,
        version=message.version,
    )


def store_result(response: pb.StoreMemoryResponse, trailers: Trailers = None) -> StoreResult:
    """What a store answered."""
    return StoreResult(
        memory=memory(response.memory), receipt=_receipt(response.receipt), deleted=0 in _deleted(trailers)
    )


def batch_result(
    request: pb.BatchStoreMemoriesRequest, response: pb.BatchStoreMemoriesResponse, trailers: Trailers = None
) -> BatchResult:
    """What a store of many answered. Raises InternalError when that is not one outcome for each."""
    if len(response.results) != len(request.memories):
        raise InternalError(f"{len(response.results)} outcomes came for {len(request.memories)} memories")
    deleted = _deleted(trailers)
    outcomes = (
        BatchOutcome(memory.id, from_status(result.error) if result.HasField("error") else None, number in deleted)
        for number, (memory, result) in enumerate(zip(request.memories, response.results, strict=True))
    )
    return BatchResult(outcomes=tuple(outcomes), receipt=_receipt(response.receipt))


def _deleted(trailers: Trailers) -> set[int]:
    """The items of a store that have been deleted since they were stored, by number."""
    numbers = [str(value) for key, value in trailers or () if key == _DELETED_TRAILER]
    return {int(number) for text in numbers for number in text.split(",") if number.isdecimal()}


def update_result(response: pb.UpdateMemoryResponse) -> UpdateResult:
    """What an update answered."""
    return UpdateResult(memory=memory(response.memory), receipt=_receipt(response.receipt))


def versions_result(response: pb.ListMemoryVersionsResponse, trailers: Trailers = None) -> VersionPage:
    """What a listing of versions answered."""
    return VersionPage(
        versions=tuple(memory(message) for message in response.versions),
        next_page_token=response.next_page_token,
        degradation_level=_level(trailers),
    )


def _level(trailers: Trailers) -> DegradationLevel:
    """The level that came behind an answer; UNSPECIFIED where none did that is known here."""
    for key, value in trailers or ():
        if key == _LEVEL_TRAILER:
            return DegradationLevel.__members__.get(str(value).upper(), DegradationLevel.UNSPECIFIED)
    return DegradationLevel.UNSPECIFIED


def erase_result(response: pb.EraseUserResponse) -> EraseResult:
    """What an erasure answered."""
    return EraseResult(
        memories_erased=response.memories_erased,
        versions_erased=response.versions_erased,
        receipt=_receipt(response.receipt),
    )


def get_result(response: pb.GetMemoryResponse) -> GetResult:
    """What a fetch answered."""
    return GetResult(memory=memory(response.memory), report=_report(response.report))


def delete_result(response: pb.DeleteMemoryResponse) -> DeleteResult:
    """What a delete answered."""
    return DeleteResult(deleted=response.deleted, receipt=_receipt(response.receipt))


def list_result(response: pb.ListMemoriesResponse) -> MemoryPage:
    """What a listing answered."""
    return MemoryPage(
        memories=tuple(memory(message) for message in response.memories),
        next_page_token=response.next_page_token,
        report=_report(response.report),
    )


def search_result(response: pb.SearchMemoriesResponse) -> SearchResult:
    """What a search answered."""
    return SearchResult(
        results=tuple(ScoredMemory(memory=memory(scored.memory), score=scored.score) for scored in response.results),
        score_kind=ScoreKind(response.score_kind),
        report=_report(response.report),
    )


def whole_page(page: MemoryPage) -> MemoryPage:
    """The page itself, when nothing is missing from it: an iteration has no other place to say so.

    Raises Unavailable for a partial page.
    """
    if not page.report.partial:
        return page
    shards = page.report.shards
    names = ", ".join(failure.shard_id for failure in shards.failed) or "unnamed"
    missing = shards.total - shards.succeeded
    raise Unavailable(
        f"the listing is incomplete: {missing} of {shards.total} shards did not answer ({names})",
        reason="PARTIAL_LISTING",
    )


def _new_memory(given: NewMemory, path: str = "") -> pb.Memory:
    """The message of a memory to store; `path` is where it stands in the request."""
    message = pb.Memory(
        id=_values.text(f"{path}id", given.id),
        user_id=_values.text(f"{path}user_id", given.user_id),
        agent_id=_values.text(f"{path}agent_id", given.agent_id),
        session_id=_values.text(f"{path}session_id", given.session_id),
        type=pb.MemoryType.ValueType(MemoryType(given.type)),
        content=_values.text(f"{path}content", given.content),
        embedding_model=_values.text(f"{path}embedding_model", given.embedding_model),
    )
    if given.metadata is not None:
        struct = _values.struct_from_metadata(given.metadata, f"{path}metadata")
        if struct.fields:  # Empty is the same as none, also to who compares requests.
            message.metadata.CopyFrom(struct)
    if given.importance is not None:
        message.importance = _values.number(f"{path}importance", given.importance)
    if given.embedding is not None:
        _values.fill_floats(f"{path}embedding", message.embedding, given.embedding)
    if given.expire_time is not None:
        message.expire_time.CopyFrom(_values.timestamp(f"{path}expire_time", given.expire_time))
    return message


def _request_id(given: str | None) -> str:
    return new_id() if given is None else _values.text("request_id", given)


def _filter(given: Filter | None) -> pb.Filter | None:
    if given is not None and not isinstance(given, Filter):
        raise invalid("filter", f"must be a condition of memshard.filters, not {type(given).__name__}")
    return None if given is None else given.message()


def _receipt(message: pb.WriteReceipt) -> WriteReceipt:
    return WriteReceipt(
        consistency_token=message.consistency_token,
        durability=Durability(message.durability),
        degradation_level=DegradationLevel(message.degradation_level),
    )


def _report(message: pb.ReadReport) -> ReadReport:
    return ReadReport(
        served_by=tuple(message.served_by),
        shards=ShardSummary(
            total=message.shards.total,
            succeeded=message.shards.succeeded,
            failed=tuple(
                ShardFailure(shard_id=failure.shard_id, error=from_status(failure.status))
                for failure in message.shards.failed
            ),
        ),
        degradation_level=DegradationLevel(message.degradation_level),
    )


def _one_or_all(user_id: str | None) -> str:
    # On the wire an empty user means everybody. An agent whose variable happens to be empty must not read everybody's
    # memories by accident, so that here only None does.
    if user_id == "":
        raise invalid("user_id", "must not be empty; None means all users")
    return "" if user_id is None else _values.text("user_id", user_id)
