"""What a request may be: the contract's bounds, checked before anything is done. Pure; each fault names its field.

Functions return the request in its normal form (ids in lower case, defaults filled in) and raise InvalidArgument.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf import struct_pb2, timestamp_pb2

from common.catalog import Cluster, Precision
from common.errors import InvalidArgument
from common.probe_user import PREFIX
from memshard.ids import new_id
from memshard.v1 import memory_pb2 as pb

MAX_NAME_BYTES = 256  # user_id by the contract; the other names keep the same bound.
MAX_CONTENT_BYTES = 64 * 1024
MAX_METADATA_BYTES = 32 * 1024
MAX_METADATA_DEPTH = 8
MAX_RESULTS = 1000
MAX_BATCH_ITEMS = 500
MAX_BATCH_BYTES = 8 * 1024 * 1024
DEFAULT_LIMIT = 10
DEFAULT_PAGE_SIZE = 100
DEFAULT_IMPORTANCE = 0.5

UPDATABLE = (
    "content",
    "metadata",
    "importance",
    "type",
    "agent_id",
    "session_id",
    "embedding",
    "expire_time",
)

# Protobuf makes a list of them each time it is asked.
_MEMORY_TYPES = frozenset(pb.MemoryType.values())
_READ_LEVELS = frozenset(pb.ReadLevel.values())
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
# Timestamps of the protobuf contract: 0001-01-01 to 9999-12-31.
_TIMESTAMP_SECONDS = range(-62_135_596_800, 253_402_300_800)
# pgvector sums squares in float32, where those of lengths beyond about 1e-19 and 1e19 vanish or overflow: without an
# error, [1e20, 1e20] scores 0 against [1, 2]. Half precision cannot get that far.
_SINGLE_LENGTHS = (1e-15, 1e18)
# Rounded to the nearest half (IEEE 754 binary16, ties to even), from here on a number is infinite, and up to here zero.
_HALF_OVERFLOWS = 65520.0
_HALF_VANISHES = 2.0**-25

bad = InvalidArgument.field


@dataclass(frozen=True, slots=True)
class Window:
    """Which results of a search are wanted: `limit` of them after the first `offset`."""

    limit: int
    offset: int

    @property
    def k(self) -> int:
        """How many results each shard has to give."""
        return self.limit + self.offset


def new_memory(given: pb.Memory, cluster: Cluster, field: str = "memory") -> None:
    """Makes the memory of a request the one that is to be stored: with defaults, with a new UUIDv7 where it has no id,
    and without the fields that only the server writes.

    In place, as an embedding takes longer to copy than everything else here takes. `field` is where the request has it,
    such as `memories[3]` in a batch.
    """
    user_id(given.user_id, f"{field}.user_id")
    given.id = memory_id(given.id, f"{field}.id") if given.id else new_id()
    _name(given.agent_id, f"{field}.agent_id")
    _name(given.session_id, f"{field}.session_id")
    given.type = _memory_type(given.type, field)
    _content(given.content, field)
    given.importance = _importance(given, field)
    given.embedding_model = _model(given.embedding_model, cluster, field)
    metadata(given.metadata, field)
    if not given.metadata.fields:
        # The same as none, so that a memory reads the same however often it was stored.
        given.ClearField("metadata")
    if given.HasField("expire_time"):
        given.expire_time.CopyFrom(_expire_time(given.expire_time, field))
    if given.embedding:
        embedding(given.embedding, cluster, f"{field}.embedding")
    # What only the server writes, and what nobody here knows.
    given.ClearField("embedding_state")
    given.ClearField("create_time")
    given.ClearField("update_time")
    given.ClearField("version")
    given.DiscardUnknownFields()


def change(given: pb.UpdateMemoryRequest, cluster: Cluster) -> pb.UpdateMemoryRequest:  # noqa: PLR0912  # A field each.
    """An update with the fields that its mask names, each once and in order, and no others."""
    memory = given.memory
    paths = sorted(set(given.update_mask.paths))
    if not paths:
        raise bad("update_mask", "INVALID_UPDATE_MASK", "must name what to change")
    for path in paths:
        if path not in UPDATABLE:
            known = ", ".join(UPDATABLE)
            raise bad("update_mask", "INVALID_UPDATE_MASK", f"{path[:100]!r} cannot be changed; these can: {known}")
    if given.HasField("expected_version") and given.expected_version < 1:
        raise bad("expected_version", "OUT_OF_RANGE", "must be 1 or more")
    change = pb.UpdateMemoryRequest(request_id=request_id(given.request_id))
    change.update_mask.paths.extend(paths)
    if given.HasField("expected_version"):
        change.expected_version = given.expected_version
    taken = change.memory
    taken.id = memory_id(memory.id, "memory.id")
    taken.user_id = user_id(memory.user_id, "memory.user_id")
    if "content" in paths:
        taken.content = _content(memory.content, "memory")
    if "metadata" in paths:
        metadata(memory.metadata, "memory")
        taken.metadata.CopyFrom(memory.metadata)
    if "importance" in paths:
        taken.importance = _importance(memory, "memory")
    if "type" in paths:
        taken.type = _memory_type(memory.type, "memory")
    if "agent_id" in paths:
        taken.agent_id = _name(memory.agent_id, "memory.agent_id")
    if "session_id" in paths:
        taken.session_id = _name(memory.session_id, "memory.session_id")
    if "embedding" in paths:
        embedding(memory.embedding, cluster, "memory.embedding")
        taken.embedding.extend(memory.embedding)
        taken.embedding_model = _model(memory.embedding_model, cluster, "memory")
    if "expire_time" in paths and memory.HasField("expire_time"):
        taken.expire_time.CopyFrom(_expire_time(memory.expire_time, "memory"))
    return change


def batch(request: pb.BatchStoreMemoriesRequest, size_bytes: int) -> None:
    """A batch of a size that the contract allows, as it came. Its items are checked one by one."""
    if not 1 <= len(request.memories) <= MAX_BATCH_ITEMS:
        raise bad("memories", "BATCH_SIZE", f"must be 1 to {MAX_BATCH_ITEMS}, not {len(request.memories)}")
    if size_bytes > MAX_BATCH_BYTES:
        raise bad("memories", "TOO_LARGE", f"must be at most {MAX_BATCH_BYTES} bytes in all")


def user_id(value: str, field: str) -> str:
    """A required user: 1 to 256 bytes without NUL. Every byte counts: no case or Unicode form is folded."""
    if not value:
        raise bad(field, "INVALID_USER_ID", "must not be empty")
    return optional_user_id(value, field)


def optional_user_id(value: str, field: str) -> str:
    """A user, or empty for all."""
    if value.startswith(PREFIX):
        raise bad(field, "INVALID_USER_ID", f"must not begin with {PREFIX}, which is reserved")
    return _name(value, field, "INVALID_USER_ID")


def memory_id(value: str, field: str) -> str:
    """A UUID in its 36-character form; returned in lower case."""
    if not _UUID.fullmatch(value):
        raise bad(field, "INVALID_ID", "must be a UUID like 0190b5a4-7b3c-7def-8123-456789abcdef")
    return value.lower()


def request_id(value: str) -> str:
    """A request id, or empty."""
    return _name(value, "request_id", "INVALID_REQUEST_ID")


def page_size(value: int) -> int:
    """A page size with its default."""
    if not 0 <= value <= MAX_RESULTS:
        raise bad("page_size", "OUT_OF_RANGE", f"must be 0 to {MAX_RESULTS}")
    return value or DEFAULT_PAGE_SIZE


def window(limit: int, offset: int) -> Window:
    """Limit and offset of a search, with the default limit."""
    if not 0 <= limit <= MAX_RESULTS:
        raise bad("limit", "OUT_OF_RANGE", f"must be 0 to {MAX_RESULTS}")
    limit = limit or DEFAULT_LIMIT
    if not 0 <= offset <= MAX_RESULTS - limit:
        raise bad("offset", "OUT_OF_RANGE", f"must be 0 or more, and limit + offset at most {MAX_RESULTS}")
    return Window(limit, offset)


def min_score(request: pb.SearchMemoriesRequest) -> float | None:
    """The least score wanted, if any."""
    if not request.HasField("min_score"):
        return None
    if not math.isfinite(request.min_score):
        raise bad("min_score", "NOT_FINITE", "must be a finite number")
    return request.min_score


def query_text(value: str) -> str:
    """The text of a search, or empty."""
    if len(value.encode()) > MAX_CONTENT_BYTES:
        raise bad("query", "TOO_LARGE", f"must be at most {MAX_CONTENT_BYTES} bytes")
    _no_nul(value, "query", "INVALID_QUERY")
    return value


def embedding(values: Sequence[float], cluster: Cluster, field: str) -> None:
    """An embedding of the cluster's dimensions that is still a direction once it is rounded to the stored precision."""
    if len(values) != cluster.dimensions:
        raise bad(field, "WRONG_DIMENSION", f"has {len(values)} numbers; this cluster's have {cluster.dimensions}")
    array = np.array(values, dtype=np.float32)
    # One look at all numbers says everything: it is NaN if any of them is.
    greatest = float(np.abs(array).max())
    if not math.isfinite(greatest):
        raise bad(field, "NOT_FINITE", "has a NaN or infinite number")
    if not greatest:
        raise bad(field, "ZERO_VECTOR", "is all zeros, which has no direction to compare")
    if cluster.precision is Precision.HALF:
        if greatest >= _HALF_OVERFLOWS:
            raise bad(field, "OUT_OF_RANGE", "has a number beyond ±65504, the range of half precision")
        if greatest <= _HALF_VANISHES:
            raise bad(field, "ZERO_VECTOR", "is all zeros once rounded to half precision")
    else:
        low, high = _SINGLE_LENGTHS
        if not low <= np.linalg.norm(array.astype(np.float64)) <= high:
            raise bad(field, "OUT_OF_RANGE", f"must have a length of {low:g} to {high:g}; scale it to 1")


def metadata(value: struct_pb2.Struct, field: str) -> None:
    """Metadata within its bounds, and such that PostgreSQL's jsonb takes it as it is."""
    if value.ByteSize() > MAX_METADATA_BYTES:
        raise bad(f"{field}.metadata", "METADATA_TOO_LARGE", f"must be at most {MAX_METADATA_BYTES} bytes")
    _struct(value, 1, f"{field}.metadata")


def read_options(options: pb.ReadOptions) -> None:
    """A known read level. Tokens are checked by whoever has the key."""
    if options.level not in _READ_LEVELS:
        raise bad("read.level", "INVALID_ENUM", f"{options.level} is no read level")
    staleness = options.max_staleness
    if staleness.seconds < 0 or not 0 <= staleness.nanos < 1_000_000_000:
        raise bad("read.max_staleness", "OUT_OF_RANGE", "must be 0 or more")
    if options.level == pb.READ_LEVEL_BOUNDED_STALENESS and not staleness.ToNanoseconds():
        raise bad("read.max_staleness", "MAX_STALENESS_REQUIRED", "must be more than 0: a read without a bound is none")


def _content(value: str, field: str) -> str:
    if not value:
        raise bad(f"{field}.content", "INVALID_CONTENT", "must not be empty")
    if len(value.encode()) > MAX_CONTENT_BYTES:
        raise bad(f"{field}.content", "INVALID_CONTENT", f"must be at most {MAX_CONTENT_BYTES} bytes of UTF-8")
    _no_nul(value, f"{field}.content", "INVALID_CONTENT")
    return value


def _name(value: str, field: str, reason: str = "INVALID_NAME") -> str:
    if len(value.encode()) > MAX_NAME_BYTES:
        raise bad(field, reason, f"must be at most {MAX_NAME_BYTES} bytes")
    _no_nul(value, field, reason)
    return value


def _no_nul(value: str, field: str, reason: str) -> None:
    if "\0" in value:
        raise bad(field, reason, "must not contain the character NUL")


def _memory_type(value: int, field: str) -> pb.MemoryType.ValueType:
    if value == pb.MEMORY_TYPE_UNSPECIFIED:
        return pb.MEMORY_TYPE_EPISODIC
    if value not in _MEMORY_TYPES:
        raise bad(f"{field}.type", "INVALID_ENUM", f"{value} is no memory type")
    return pb.MemoryType.ValueType(value)


def _importance(memory: pb.Memory, field: str) -> float:
    if not memory.HasField("importance"):
        return DEFAULT_IMPORTANCE
    # Written so that NaN, which compares as false, is out of range.
    if not 0 <= memory.importance <= 1:
        raise bad(f"{field}.importance", "OUT_OF_RANGE", "must be 0 to 1")
    return memory.importance


def _model(value: str, cluster: Cluster, field: str) -> str:
    _name(value, f"{field}.embedding_model")
    if value and cluster.embedding_model and value != cluster.embedding_model:
        raise bad(
            f"{field}.embedding_model",
            "WRONG_MODEL",
            f"this cluster holds embeddings of {cluster.embedding_model}; those of two models cannot be compared",
        )
    return value or cluster.embedding_model


def _expire_time(value: timestamp_pb2.Timestamp, field: str) -> timestamp_pb2.Timestamp:
    """An expiry, to the microsecond. Whether it is past, the shard finds: a request in time may be repeated later."""
    if value.seconds not in _TIMESTAMP_SECONDS or not 0 <= value.nanos < 1_000_000_000:
        raise bad(f"{field}.expire_time", "INVALID_TIMESTAMP", "is no time between the years 1 and 9999")
    kept = timestamp_pb2.Timestamp()
    kept.FromMicroseconds(value.ToMicroseconds())
    return kept


def _struct(value: struct_pb2.Struct, depth: int, field: str) -> None:
    if depth > MAX_METADATA_DEPTH:
        raise bad(field, "METADATA_TOO_DEEP", f"must be at most {MAX_METADATA_DEPTH} deep")
    for key, item in value.fields.items():
        _no_nul(key, field, "INVALID_METADATA")
        _value(item, depth, field)


def _value(value: struct_pb2.Value, depth: int, field: str) -> None:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        _struct(value.struct_value, depth + 1, field)
    elif kind == "list_value":
        if depth + 1 > MAX_METADATA_DEPTH:
            raise bad(field, "METADATA_TOO_DEEP", f"must be at most {MAX_METADATA_DEPTH} deep")
        for item in value.list_value.values:
            _value(item, depth + 1, field)
    elif kind == "string_value":
        _no_nul(value.string_value, field, "INVALID_METADATA")
    elif kind == "number_value" and not math.isfinite(value.number_value):
        raise bad(field, "INVALID_METADATA", "has a NaN or infinite number, which JSON has not")
    elif kind is None:
        raise bad(field, "INVALID_METADATA", "has a value of no kind")
