"""Random sequences of operations: every answer, and all that is there in the end, is as a plain model in memory says.

Each sequence has a user of its own; the ids are the same for all users. What a request's faults are, the model tells as
a set: which of several is named is the service's choice.
"""

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf import struct_pb2, timestamp_pb2
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb
from memshard.v1.memory_pb2_grpc import MemoryServiceStub
from tests.support.cluster import LocalCluster
from tests.support.filter_cases import cases
from tests.support.filter_model import matches
from tests.support.wire import reason_of

SEQUENCES = 500
SEQUENCES_BY_CONTENT = 60
STEPS = 8
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
_REQUEST_IDS = ["r", "R"]
_FUTURE = timestamp_pb2.Timestamp(seconds=4_102_444_800, nanos=123_456_789)  # The year 2100, finer than is kept.
_PAST = timestamp_pb2.Timestamp(seconds=1_000_000_000)
_PATHS = ["content", "metadata", "importance", "type", "agent_id", "session_id", "embedding", "expire_time"]


# ---- What is drawn.


@dataclass(frozen=True)
class Step:
    """A request to send, still without its user.

    `ahead`: for an update, how far from the memory's version the expected one is. `repeats`: send again, as it was
    sent, the step that many before this one, if there is one.
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
_ids = st.sampled_from(_IDS) | st.sampled_from([_IDS[0], _IDS[0].upper()])
_rarely = st.integers(0, 15).map(lambda number: number == 15)
_request_ids = st.sampled_from(["", "", *_REQUEST_IDS])


@st.composite
def _memories(draw: st.DrawFn, bodies: list[pb.Memory]) -> pb.Memory:
    """All of a memory but its user. The times of `bodies` are in it: they are for the server only, and must not count."""
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


def _steps(bodies: list[pb.Memory]) -> st.SearchStrategy[Step]:
    new = _new_memories(bodies)
    stores = st.builds(lambda memory: Step(pb.StoreMemoryRequest(memory=memory)), new)
    batches = st.builds(
        lambda memories: Step(pb.BatchStoreMemoriesRequest(memories=memories)), st.lists(new, min_size=1, max_size=4)
    )
    deletes = st.builds(
        lambda id, request_id: Step(pb.DeleteMemoryRequest(id=id, request_id=request_id)), _ids, _request_ids
    )
    repeats = st.builds(lambda back: Step(repeats=back), st.integers(1, STEPS - 1))
    updates = _updates(bodies)
    return st.one_of(stores, updates, deletes, batches, repeats, stores, updates)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Some steps, and a look: its filters were drawn for the metadata, names and types that the memories have."""
    case = draw(cases())
    filters = st.sampled_from(case.filters)
    search = pb.SearchMemoriesRequest(
        embedding=draw(_vectors),
        limit=draw(st.integers(0, 6)),
        offset=draw(st.sampled_from([0, 0, 0, 1, 3])),
        filter=draw(st.none() | filters),
        min_score=draw(st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0]) | st.floats(-1.1, 1.1, width=32)),
        include_embedding=draw(st.booleans()),
    )
    look = Look(draw(filters), draw(st.integers(1, 6)), draw(st.booleans()), search)
    return Plan(draw(st.lists(_steps(case.memories), min_size=1, max_size=STEPS)), look)


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
        first = pb.Memory()
        first.CopyFrom(asked)
        first.ClearField("embedding")
        first.embedding.extend(np.array(asked.embedding, dtype=np.float16).astype(np.float32).tolist())
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
            raise Refused(*faults, *({"WRONG_DIMENSION"} if "embedding" in paths else ()))
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
        changed = _overlaid(now, _normal(given), paths)
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
    for output_only in ("create_time", "update_time", "version", "embedding_state"):
        memory.ClearField(output_only)
    memory.id = given.id.lower()
    memory.type = given.type or pb.MEMORY_TYPE_EPISODIC
    memory.importance = given.importance if given.HasField("importance") else 0.5
    memory.ClearField("metadata")
    if given.metadata.fields:
        memory.metadata.CopyFrom(given.metadata)
        _without_minus_zero(struct_pb2.Value(struct_value=memory.metadata))
        memory.metadata.CopyFrom(_without_minus_zero(struct_pb2.Value(struct_value=given.metadata)).struct_value)
    if given.HasField("expire_time"):
        memory.expire_time.nanos = given.expire_time.nanos // 1000 * 1000
    return memory


def _without_minus_zero(value: struct_pb2.Value) -> struct_pb2.Value:
    """JSON's numbers, as PostgreSQL keeps them, have no zero below zero."""
    if value.HasField("number_value"):
        value.number_value += 0.0
    for item in [*value.list_value.values, *value.struct_value.fields.values()]:
        _without_minus_zero(item)
    return value


def _overlaid(memory: pb.Memory, given: pb.Memory, paths: set[str]) -> pb.Memory:
    """`memory` with the fields of `given` that are named; a model belongs to its embedding."""
    changed = pb.Memory()
    changed.CopyFrom(memory)
    for path in [*paths, *(["embedding_model"] if "embedding" in paths else [])]:
        changed.ClearField(path)  # type: ignore[arg-type]  # A field's name, of those in _PATHS.
        only = pb.Memory()
        only.CopyFrom(given)
        for descriptor, _ in given.ListFields():
            if descriptor.name != path:
                only.ClearField(descriptor.name)  # type: ignore[arg-type]
        changed.MergeFrom(only)
    return changed
