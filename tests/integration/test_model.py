"""Random sequences of operations: every answer, and all that is there in the end, is as a plain model in memory says.

Each sequence has a user of its own; the ids are the same for all users. What a request's faults are, the model tells as
a set: which of several is named is the service's choice. MEMSHARD_MODEL_SEED=n repeats a run.
"""

import os
import random
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2, struct_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb
from memshard.v1.memory_pb2_grpc import MemoryServiceStub
from tests.support.cluster import LocalCluster
from tests.support.filter_cases import cases
from tests.support.filter_model import compare, matches
from tests.support.wire import reason_of

SEQUENCES = 500
SEQUENCES_ELSEWHERE = 60  # Under each other placement.
SEED_IN_CI = 1
STEPS = 7
DIMENSIONS = 8
ROUNDING = 1e-3
_CALL_S = 20.0

Write: TypeAlias = (
    pb.StoreMemoryRequest | pb.BatchStoreMemoriesRequest | pb.UpdateMemoryRequest | pb.DeleteMemoryRequest
)
Vector: TypeAlias = tuple[float, ...]

# Of both kinds of UUID, in no order.
_IDS = [
    "9f1c7a52-6f0b-4c6e-8d0e-2b7a54c0a001",
    "0190b5a4-7b3c-7def-8123-456789abcdef",
    "01a1b5a4-7b3c-7def-bfff-000000000000",
    "00000000-0000-4000-8000-00000000000f",
    "ffffffff-ffff-4fff-bfff-ffffffffffff",
]
_TEXTS = ["tea", "Tea", "te\u0301", "t\u00e9", "%", "a longer text of several words", "\U0001f375"]
_MODELS = ["", "model-1"]
_REQUEST_IDS = ["r", "R", "r%"]
_FUTURE = timestamp_pb2.Timestamp(seconds=4_102_444_800, nanos=123_456_789)  # The year 2100, finer than is kept.
_PAST = timestamp_pb2.Timestamp(seconds=1_000_000_000)
_PATHS = ["content", "metadata", "importance", "type", "agent_id", "session_id", "embedding", "expire_time"]


# ---- What is drawn.


@dataclass(frozen=True)
class Step:
    """A request to send, still without its user.

    `ahead`: for an update, how far from the memory's version the expected one is. `repeats`: send again, as it was,
    the request that was sent that many before this one, if there is one.
    """

    request: Write | None = None
    ahead: int | None = None
    repeats: int = 0


@dataclass(frozen=True)
class Look:
    """How to look at what is there in the end."""

    filter: pb.Filter
    page_size: int
    include_embedding: bool
    search: pb.SearchMemoriesRequest


@dataclass(frozen=True)
class Plan:
    steps: list[Step]
    look: Look


def _random_vector(seed: int) -> Vector:
    return tuple(np.random.default_rng(seed).normal(size=DIMENSIONS).astype(np.float32).tolist())


_BASIS: list[Vector] = [tuple(float(row == column) for column in range(DIMENSIONS)) for row in range(3)]
# Equal ones, parallel ones, opposite ones, one that half precision rounds to another, and any.
_vectors: st.SearchStrategy[Vector] = st.sampled_from(
    [*_BASIS, (2.0, *_BASIS[0][1:]), (-1.0, *_BASIS[0][1:]), (1.0, 1e-9, *_BASIS[0][2:]), (1.0,) * DIMENSIONS]
) | st.integers(0, 2**16).map(_random_vector)
# Some more often than others: what is stored is then also changed and deleted.
_ids = st.sampled_from([*_IDS, *_IDS[:2], _IDS[0], _IDS[0].upper()])
_rarely = st.sampled_from([False] * 19 + [True])
_request_ids = st.sampled_from(["", *_REQUEST_IDS])


@st.composite
def _memories(draw: st.DrawFn, bodies: list[pb.Memory]) -> pb.Memory:
    """All of a memory but its user; and times and a version, which are the server's to set, and must not count."""
    memory = pb.Memory()
    memory.CopyFrom(draw(st.sampled_from(bodies)))
    memory.id = draw(_ids)
    memory.version = 7
    memory.content = "" if draw(_rarely) else draw(st.sampled_from(_TEXTS))
    if not draw(_rarely):
        memory.embedding.extend(draw(_vectors))
        memory.embedding_model = draw(st.sampled_from(_MODELS))
    memory.ClearField("expire_time")
    if draw(_rarely):
        memory.expire_time.CopyFrom(_PAST)
    elif draw(st.booleans()):
        memory.expire_time.CopyFrom(_FUTURE)
    if draw(_rarely):
        memory.ClearField("importance")
        memory.ClearField("type")
    return memory


@st.composite
def _new_memories(draw: st.DrawFn, bodies: list[pb.Memory]) -> pb.Memory:
    memory = draw(_memories(bodies))
    if draw(_rarely):
        memory.ClearField("id")
    return memory


@st.composite
def _updates(draw: st.DrawFn, bodies: list[pb.Memory]) -> Step:
    request = pb.UpdateMemoryRequest(memory=draw(_memories(bodies)), request_id=draw(_request_ids))
    paths = draw(st.lists(st.sampled_from(_PATHS), min_size=1, max_size=4))
    if "content" in paths and not draw(_rarely):
        paths.append("embedding")
    request.update_mask.paths.extend(paths)
    return Step(request, ahead=draw(st.sampled_from([None, None, 0, 0, 1, -1])))


def _batch(memories: list[pb.Memory]) -> Step:
    return Step(pb.BatchStoreMemoriesRequest(memories=memories))


def _steps(bodies: list[pb.Memory]) -> st.SearchStrategy[Step]:
    new = _new_memories(bodies)
    stores = st.builds(lambda memory: Step(pb.StoreMemoryRequest(memory=memory)), new)
    deletes = st.builds(
        lambda id, request_id: Step(pb.DeleteMemoryRequest(id=id, request_id=request_id)), _ids, _request_ids
    )
    repeats = st.builds(lambda back: Step(repeats=back), st.sampled_from([1, 1, 2, 2, 3, 4, 5, 6]))
    updates = _updates(bodies)
    batches = st.lists(new, min_size=1, max_size=4).map(_batch)
    # Not st.one_of, which takes what is named thrice for one.
    kinds = [updates, updates, updates, repeats, repeats, stores, deletes, batches]
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Some steps, and a look: its filters were drawn for the metadata, names and types that the memories have."""
    case = draw(cases())
    # Any filters, and some that are more likely to part the memories in two.
    parting = [compare("importance", "LTE", body.importance) for body in case.memories]
    parting += [compare("type", "EQ", pb.MemoryType.Name(body.type)) for body in case.memories]
    filters = st.sampled_from(case.filters) | st.sampled_from(parting)
    search = pb.SearchMemoriesRequest(
        embedding=draw(_vectors),
        limit=draw(st.integers(0, 6)),
        offset=draw(st.sampled_from([0, 0, 0, 1, 3])),
        filter=draw(st.none() | filters),
        min_score=draw(st.none() | st.sampled_from([-1.5, -1.0, 0.0, 0.5, 1.0, 1.5]) | st.floats(-1, 1, width=32)),
        include_embedding=draw(st.booleans()),
    )
    look = Look(draw(filters), draw(st.integers(1, 6)), draw(st.booleans()), search)
    # Little can be wrong with nothing: memories come first.
    first = st.lists(_new_memories(case.memories), min_size=2, max_size=5, unique_by=lambda memory: memory.id.lower())
    return Plan([_batch(draw(first)), *draw(st.lists(_steps(case.memories), min_size=2, max_size=STEPS))], look)


# ---- The model.


class Refused(Exception):
    """What the model expects instead of an answer: one of these reasons."""

    def __init__(self, *reasons: str) -> None:
        super().__init__(reasons)
        self.reasons = set(reasons)


_CODES = {
    "MEMORY_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "ID_TAKEN": grpc.StatusCode.ALREADY_EXISTS,
    "VERSION_MISMATCH": grpc.StatusCode.ABORTED,
}


@dataclass
class Kept:
    """An id that is taken: by which request, all versions of the memory, oldest first, and whether it is deleted."""

    request: pb.Memory
    versions: list[pb.Memory]
    deleted: bool = False


@dataclass
class Model:
    """One user's memories. Its methods change it; times and new ids, which the server makes, are taken from answers."""

    user: str
    kept: dict[str, Kept] = field(default_factory=dict)
    # Request id → what was asked, and the version or the outcome that was answered.
    applied: dict[str, tuple[bytes, str, int]] = field(default_factory=dict)

    def live(self) -> list[pb.Memory]:
        """Newest first."""
        memories = [kept.versions[-1] for kept in self.kept.values() if not kept.deleted]
        return sorted(memories, key=lambda m: (m.create_time.ToMicroseconds(), uuid.UUID(m.id).bytes), reverse=True)

    def version(self, id: str) -> int:
        return self.kept[id].versions[-1].version if id in self.kept else 1

    def faults(self, given: pb.Memory) -> set[str]:
        """Why a new memory cannot be stored, if it cannot."""
        faults = _faults(given)
        kept = self.kept.get(given.id.lower())
        if kept is not None and kept.request != _normal(given):
            faults.add("ID_TAKEN")
        # A repetition is the same success at any time.
        if kept is None and _expired(given):
            faults.add("EXPIRE_TIME_IN_PAST")
        return faults

    def store(self, given: pb.Memory, stored: pb.Memory) -> None:
        """`stored`: what was answered, or read, of a memory that was stored without fault and just now."""
        asked = _normal(given)
        asked.id = stored.id
        first = _rounded(asked)
        first.embedding_state = pb.EMBEDDING_STATE_READY
        first.create_time.CopyFrom(stored.create_time)
        first.update_time.CopyFrom(stored.create_time)
        first.version = 1
        self.kept[asked.id] = Kept(asked, [first])

    def update(self, request: pb.UpdateMemoryRequest) -> tuple[pb.Memory, bool]:
        """The memory as it is to be, and whether that is news (without its update time, then)."""
        given, paths = request.memory, set(request.update_mask.paths)
        faults = _faults(given) & {
            *({"INVALID_CONTENT"} if "content" in paths else ()),
            *({"EMBEDDING_REQUIRED"} if {"content", "embedding"} & paths else ()),
        }
        if "content" in paths and "embedding" not in paths:
            faults.add("EMBEDDING_REQUIRED")
        if faults:
            raise Refused(*faults, *(() if given.embedding else ("WRONG_DIMENSION",)))
        asked = self._asked(request)
        if (before := self.applied.get(request.request_id)) is not None:
            if before[:2] == (asked, given.id.lower()):
                return self.kept[given.id.lower()].versions[before[2] - 1], False
            faults.add("REQUEST_ID_REUSED")
        kept = self.kept.get(given.id.lower())
        if kept is None or kept.deleted:
            raise Refused(*faults, "MEMORY_NOT_FOUND")
        now = kept.versions[-1]
        if request.HasField("expected_version") and request.expected_version != now.version:
            faults.add("VERSION_MISMATCH")
        if "expire_time" in paths and _expired(given):
            faults.add("EXPIRE_TIME_IN_PAST")
        if faults:
            raise Refused(*faults)
        changed = _overlaid(now, _rounded(_normal(given)), paths)
        changed.version += 1
        kept.versions.append(changed)
        self._apply(request.request_id, asked, given.id.lower(), changed.version)
        return changed, True

    def delete(self, request: pb.DeleteMemoryRequest) -> bool:
        id = request.id.lower()
        if (before := self.applied.get(request.request_id)) is not None:
            if before[:2] == (b"", id):
                return bool(before[2])
            raise Refused("REQUEST_ID_REUSED")
        kept = self.kept.get(id)
        deleted = kept is not None and not kept.deleted
        if kept is not None and deleted:
            kept.deleted = True
            for version in kept.versions:
                for name in ("content", "metadata", "agent_id", "session_id"):
                    version.ClearField(name)
        self._apply(request.request_id, b"", id, deleted)
        return deleted

    def _apply(self, request_id: str, asked: bytes, id: str, answer: int) -> None:
        if request_id:
            self.applied[request_id] = (asked, id, answer)

    def _asked(self, request: pb.UpdateMemoryRequest) -> bytes:
        """What tells an update from another one."""
        paths = sorted(set(request.update_mask.paths))
        essence = pb.UpdateMemoryRequest(memory=_overlaid(pb.Memory(), _normal(request.memory), set(paths)))
        essence.update_mask.paths.extend(paths)
        if request.HasField("expected_version"):
            essence.expected_version = request.expected_version
        return essence.SerializeToString(deterministic=True)


def _faults(given: pb.Memory) -> set[str]:
    return {
        *(() if given.content else ("INVALID_CONTENT",)),
        *(() if given.embedding else ("EMBEDDING_REQUIRED",)),
    }


def _expired(given: pb.Memory) -> bool:
    return given.HasField("expire_time") and given.expire_time.seconds <= _PAST.seconds


def _normal(given: pb.Memory) -> pb.Memory:
    """What the caller says of a memory, each thing in one form."""
    memory = pb.Memory()
    memory.CopyFrom(given)
    for output_only in ("create_time", "update_time", "version"):
        memory.ClearField(output_only)
    memory.id = given.id.lower()
    memory.type = given.type or pb.MEMORY_TYPE_EPISODIC
    memory.importance = given.importance if given.HasField("importance") else 0.5
    if given.HasField("expire_time"):
        memory.expire_time.nanos = given.expire_time.nanos // 1000 * 1000
    return _with_plain_metadata(memory)


def _with_plain_metadata(memory: pb.Memory) -> pb.Memory:
    """Empty metadata are none, and no zero in them is below zero: JSON keeps no sign of it."""
    plain = _without_minus_zero(struct_pb2.Value(struct_value=memory.metadata)).struct_value
    memory.ClearField("metadata")
    if plain.fields:
        memory.metadata.CopyFrom(plain)
    return memory


def _rounded(memory: pb.Memory) -> pb.Memory:
    """With the embedding as it is kept."""
    kept = pb.Memory()
    kept.CopyFrom(memory)
    kept.ClearField("embedding")
    kept.embedding.extend(np.array(memory.embedding, dtype=np.float16).astype(np.float32).tolist())
    return kept


def _without_minus_zero(value: struct_pb2.Value) -> struct_pb2.Value:
    if value.HasField("number_value"):
        value.number_value += 0.0
    for item in [*value.list_value.values, *value.struct_value.fields.values()]:
        _without_minus_zero(item)
    return value


def _overlaid(memory: pb.Memory, given: pb.Memory, paths: set[str]) -> pb.Memory:
    """`memory` with the fields of `given` that are named; the embedding's model is a part of it."""
    changed = pb.Memory()
    changed.CopyFrom(memory)
    with_model = {*paths, *(["embedding_model"] if "embedding" in paths else [])}
    field_mask_pb2.FieldMask(paths=with_model).MergeMessage(given, changed, True, True)
    return changed


# ---- The cluster beside the model.


class Run:
    """One plan, carried out for a new user."""

    def __init__(self, api: MemoryServiceStub) -> None:
        self._api = api
        self._model = Model(f"user-{uuid.uuid4()}")
        self._sent: list[Write] = []

    def take(self, step: Step) -> None:
        """Sends a step's request and checks the answer, or that it is refused, by the model."""
        request = self._request_of(step)
        if request is None:
            return
        self._sent.append(request)
        match request:
            case pb.StoreMemoryRequest():
                self._store(request)
            case pb.BatchStoreMemoriesRequest():
                self._store_batch(request)
            case pb.UpdateMemoryRequest():
                self._update(request)
            case pb.DeleteMemoryRequest():
                self._delete(request)

    def look(self, look: Look) -> None:
        """Compares all that can be read."""
        live = self._model.live()
        for filter in (None, look.filter):
            listed = [m for m in live if filter is None or matches(filter, m)]
            event(f"listed {'all' if listed == live else 'some' if listed else 'none'}")
            assert list(self._listed(filter, look)) == _shown(listed, embedding=look.include_embedding)
        ids = {*_IDS, *self._model.kept}
        gets = [self._api.GetMemory.future(self._get(id), timeout=_CALL_S) for id in ids]
        histories = [self._history(id, look.page_size) for id in ids]
        for id, get, history in zip(ids, gets, histories, strict=True):
            self._look_at(id, get.result, history)
        self._search(look.search, live)

    def _request_of(self, step: Step) -> Write | None:
        if step.request is None:
            return self._sent[-step.repeats] if step.repeats <= len(self._sent) else None
        request = type(step.request)()
        request.CopyFrom(step.request)  # type: ignore[arg-type]  # Of its own type.
        match request:
            case pb.DeleteMemoryRequest():
                request.user_id = self._model.user
            case pb.BatchStoreMemoriesRequest():
                for memory in request.memories:
                    memory.user_id = self._model.user
            case _:
                request.memory.user_id = self._model.user
        if isinstance(request, pb.UpdateMemoryRequest) and step.ahead is not None:
            request.expected_version = max(1, self._model.version(request.memory.id.lower()) + step.ahead)
        return request

    def _store(self, request: pb.StoreMemoryRequest) -> None:
        given = request.memory
        faults = self._model.faults(given)
        if faults:
            self._refused("StoreMemory", request, faults)
            return
        stored = self._api.StoreMemory(request, timeout=_CALL_S).memory
        known = self._model.kept.get(given.id.lower())
        if known is None:
            event("stored")
            self._model.store(given, stored)
            assert [_with_plain_metadata(stored)] == _shown([self._model.kept[stored.id].versions[0]])
        elif known.deleted:
            event("stored again, and deleted since")
            assert (stored.id, stored.content) == (known.request.id, known.request.content)
        else:
            event("stored again")
            assert [stored] == _shown([known.versions[-1]])

    def _store_batch(self, request: pb.BatchStoreMemoriesRequest) -> None:
        results = self._api.BatchStoreMemories(request, timeout=_CALL_S).results
        assert len(results) == len(request.memories)
        late: list[tuple[pb.Memory, str]] = []
        for item, result in zip(request.memories, results, strict=True):
            faults = self._model.faults(item)
            if faults == {"EXPIRE_TIME_IN_PAST"}:
                late.append((item, _reason(result.error)))
            elif faults:
                assert _reason(result.error) in faults
            else:
                assert result.id == (item.id.lower() or result.id)
                if result.id not in self._model.kept:
                    event("stored in a batch")
                    self._model.store(item, self._api.GetMemory(self._get(result.id), timeout=_CALL_S).memory)
        for item, reason in late:
            # Another item of the batch may have taken its id.
            assert reason in {"EXPIRE_TIME_IN_PAST", *self._model.faults(item)}

    def _update(self, request: pb.UpdateMemoryRequest) -> None:
        try:
            expected, news = self._model.update(request)
        except Refused as refused:
            self._refused("UpdateMemory", request, refused.reasons)
            return
        answer = self._api.UpdateMemory(request, timeout=_CALL_S).memory
        event("updated" if news else "updated again")
        if news:
            assert answer.update_time.ToMicroseconds() > expected.update_time.ToMicroseconds()
            expected.update_time.CopyFrom(answer.update_time)
        assert [answer] == _shown([expected])

    def _delete(self, request: pb.DeleteMemoryRequest) -> None:
        try:
            expected = self._model.delete(request)
        except Refused as refused:
            self._refused("DeleteMemory", request, refused.reasons)
            return
        event(f"deleted: {expected}")
        assert self._api.DeleteMemory(request, timeout=_CALL_S).deleted == expected

    def _refused(self, rpc: str, request: Write, reasons: set[str]) -> None:
        with pytest.raises(grpc.RpcError) as error:
            getattr(self._api, rpc)(request, timeout=_CALL_S)
        reason = reason_of(error.value)  # type: ignore[arg-type]  # It has what those of grpc.aio have.
        assert reason in reasons, f"{reason}, not {reasons}: {error.value.details()}"
        assert error.value.code() is _CODES.get(reason, grpc.StatusCode.INVALID_ARGUMENT)
        event(f"{rpc} refused: {reason}")

    def _get(self, id: str) -> pb.GetMemoryRequest:
        return pb.GetMemoryRequest(id=id, user_id=self._model.user, include_embedding=True)

    def _look_at(self, id: str, get: Callable[[], pb.GetMemoryResponse], history: Iterator[pb.Memory]) -> None:
        kept = self._model.kept.get(id)
        if kept is None or kept.deleted:
            with pytest.raises(grpc.RpcError) as missing:
                get()
            assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        else:
            assert get().memory == kept.versions[-1]
        if kept is None:
            with pytest.raises(grpc.RpcError) as missing:
                list(history)
            assert missing.value.code() is grpc.StatusCode.NOT_FOUND
        else:
            assert list(history) == _shown(kept.versions[::-1])

    def _listed(self, filter: pb.Filter | None, look: Look) -> Iterator[pb.Memory]:
        request = pb.ListMemoriesRequest(
            user_id=self._model.user,
            filter=filter,
            page_size=look.page_size,
            include_embedding=look.include_embedding,
        )
        for _ in range(_MAX_PAGES):
            page = self._api.ListMemories(request, timeout=_CALL_S)
            assert len(page.memories) <= look.page_size
            assert not page.report.shards.failed
            yield from page.memories
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
        raise AssertionError("the listing has no end")

    def _history(self, id: str, page_size: int) -> Iterator[pb.Memory]:
        """The versions. Their first page is under way at once, not when it is looked at."""
        request = pb.ListMemoryVersionsRequest(id=id, user_id=self._model.user, page_size=page_size)
        return self._pages(request, self._api.ListMemoryVersions.future(request, timeout=_CALL_S).result)

    def _pages(
        self, request: pb.ListMemoryVersionsRequest, first: Callable[[], pb.ListMemoryVersionsResponse]
    ) -> Iterator[pb.Memory]:
        page = first()
        for _ in range(_MAX_PAGES):
            assert len(page.versions) <= request.page_size
            yield from page.versions
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
            page = self._api.ListMemoryVersions(request, timeout=_CALL_S)
        raise AssertionError("the versions have no end")

    def _search(self, wanted: pb.SearchMemoriesRequest, live: list[pb.Memory]) -> None:
        request = pb.SearchMemoriesRequest()
        request.CopyFrom(wanted)
        request.user_id = self._model.user
        ranking = _ranking(request, live)
        if request.HasField("min_score"):
            # Neither side is to decide by what rounding does.
            while any(abs(score - request.min_score) < ROUNDING for score in ranking.values()):
                request.min_score += 2 * ROUNDING
            ranking = {id: score for id, score in ranking.items() if score >= request.min_score}
        found = self._api.SearchMemories(request, timeout=_CALL_S)
        assert not found.report.shards.failed
        assert found.score_kind == pb.SCORE_KIND_COSINE
        results = list(found.results)
        expected = list(ranking.values())[request.offset : request.offset + (request.limit or 10)]
        event(f"found: {'some' if expected else 'nothing'}")
        assert [r.score for r in results] == pytest.approx(expected, abs=ROUNDING)
        assert [r.score for r in results] == pytest.approx([ranking[r.memory.id] for r in results], abs=ROUNDING)
        assert len({r.memory.id for r in results}) == len(results)
        assert results == sorted(results, key=lambda r: (-r.score, r.memory.id))
        assert [r.memory for r in results] == _shown(
            [self._model.kept[r.memory.id].versions[-1] for r in results], embedding=request.include_embedding
        )


_MAX_PAGES = 100


def _ranking(request: pb.SearchMemoriesRequest, live: list[pb.Memory]) -> dict[str, float]:
    """Id → cosine similarity of all memories that the filter lets through, best first, ties by id."""
    wanted = [m for m in live if not request.HasField("filter") or matches(request.filter, m)]
    query = np.array(request.embedding, dtype=np.float16).astype(np.float64)
    scores: dict[str, float] = {}
    for memory in wanted:
        row = np.array(memory.embedding, dtype=np.float64)
        scores[memory.id] = float(row @ query / (np.linalg.norm(row) * np.linalg.norm(query)))
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def _shown(memories: list[pb.Memory], *, embedding: bool = False) -> list[pb.Memory]:
    """As they are read, with or without their embeddings."""
    shown = []
    for memory in memories:
        copy = pb.Memory()
        copy.CopyFrom(memory)
        if not embedding:
            copy.ClearField("embedding")
        shown.append(copy)
    return shown


def _reason(status: status_pb2.Status) -> str:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""


@dataclass(frozen=True)
class Placed:
    """A cluster's API, and how many sequences to send to it."""

    api: MemoryServiceStub
    sequences: int


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="session",
    params=[
        ("user_based", SEQUENCES),
        *((placement, SEQUENCES_ELSEWHERE) for placement in ("content_hash", "temporal", "memory_type")),
    ],
    ids=lambda param: param[0],
)
async def placed(request: pytest.FixtureRequest) -> AsyncIterator[Placed]:
    placement, sequences = request.param
    options = ["--placement", placement]
    async with LocalCluster(shards=3, embedder="none", dimensions=DIMENSIONS, options=options) as running:
        with grpc.insecure_channel(running.address) as channel:
            yield Placed(MemoryServiceStub(channel), sequences)


# Too slow and too much are no faults of examples that are large on purpose.
_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.timeout(400)  # A failure is made smaller for up to five minutes.
def test_the_cluster_does_as_the_model_does(placed: Placed) -> None:
    fresh = SEED_IN_CI if os.environ.get("CI") else random.randrange(2**32)
    number = int(os.environ.get("MEMSHARD_MODEL_SEED", fresh))
    print(f"MEMSHARD_MODEL_SEED={number}")

    @seed(number)
    @settings(max_examples=placed.sequences, deadline=None, print_blob=True, suppress_health_check=_HEALTH)
    @given(plan=plans())
    def carry_out(plan: Plan) -> None:
        run = Run(placed.api)
        for step in plan.steps:
            run.take(step)
        run.look(plan.look)

    carry_out()
