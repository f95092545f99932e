"""Requests from arguments, results from responses: pure functions, which both clients share so as not to diverge."""

from __future__ import annotations

from datetime import datetime

from memshard import _values
from memshard.errors import Unavailable, from_status, invalid
from memshard.ids import new_id
from memshard.types import (
    DegradationLevel,
    DeleteResult,
    Durability,
    Embedding,
    EmbeddingState,
    Memory,
    MemoryPage,
    MemoryType,
    Metadata,
    ReadReport,
    ScoredMemory,
    ScoreKind,
    SearchResult,
    ShardFailure,
    ShardSummary,
    StoreResult,
    WriteReceipt,
)
from memshard.v1 import memory_pb2 as pb


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
    memory = pb.Memory(
        id=new_id() if id is None else _values.text("id", id),
        user_id=_values.text("user_id", user_id),
        agent_id=_values.text("agent_id", agent_id),
        session_id=_values.text("session_id", session_id),
        type=pb.MemoryType.ValueType(MemoryType(type)),
        content=_values.text("content", content),
        embedding_model=_values.text("embedding_model", embedding_model),
    )
    if metadata is not None and (struct := _values.struct_from_metadata(metadata)).fields:
        memory.metadata.CopyFrom(struct)  # Empty is the same as none, also to who compares requests.
    if importance is not None:
        memory.importance = _values.number("importance", importance)
    if embedding is not None:
        _values.fill_floats("embedding", memory.embedding, embedding)
    if expire_time is not None:
        memory.expire_time.CopyFrom(_values.timestamp("expire_time", expire_time))
    return pb.StoreMemoryRequest(memory=memory)


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
        request_id=new_id() if request_id is None else _values.text("request_id", request_id),
    )


def list_request(*, user_id: str, page_size: int, page_token: str, include_embedding: bool) -> pb.ListMemoriesRequest:
    """One page of a listing. A size of 0, the wire's word for its default, is what nobody means who says it here."""
    return pb.ListMemoriesRequest(
        user_id=_values.text("user_id", user_id),
        page_size=_values.count("page_size", page_size, least=1),
        page_token=_values.text("page_token", page_token),
        include_embedding=include_embedding,
    )


def search_request(
    *,
    query: str,
    user_id: str | None,
    embedding: Embedding | None,
    limit: int,
    offset: int,
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


def store_result(response: pb.StoreMemoryResponse) -> StoreResult:
    """What a store answered."""
    return StoreResult(memory=memory(response.memory), receipt=_receipt(response.receipt))


def get_result(response: pb.GetMemoryResponse) -> Memory:
    """What a fetch answered."""
    return memory(response.memory)


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
