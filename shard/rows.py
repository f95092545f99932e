"""Database rows as messages, and back."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import numpy as np
from google.protobuf import json_format, struct_pb2, timestamp_pb2
from pgvector import HalfVector, Vector

from common.catalog import Precision
from memshard.v1 import memory_pb2 as pb

# All but the embedding, which is large and seldom wanted.
COLUMNS = """
user_id, id, agent_id, session_id, type, content, metadata, importance, embedding_model, embedding IS NULL AS pending,
create_time, update_time, expire_time, version
"""
# The same of `memory_versions`, where no embedding is kept.
KEPT_COLUMNS = """
user_id, id, agent_id, session_id, type, content, metadata, importance, embedding_model, pending,
create_time, update_time, expire_time, version
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DAY_S = 86_400
_LATEST = datetime.max.replace(tzinfo=UTC) - _MICROSECOND


def to_memory(row: asyncpg.Record, *, include_embedding: bool = False) -> pb.Memory:
    """A row with COLUMNS, and `embedding` when it is wanted, as a message."""
    memory = pb.Memory()
    fill_memory(memory, row, include_embedding=include_embedding)
    return memory


def fill_memory(memory: pb.Memory, row: asyncpg.Record, *, include_embedding: bool = False) -> None:
    """The same into an empty message, such as a new element of an answer: made there, none has to be copied."""
    memory.id = str(row["id"])
    memory.user_id = row["user_id"]
    memory.agent_id = row["agent_id"]
    memory.session_id = row["session_id"]
    memory.type = row["type"]
    memory.content = row["content"]
    memory.importance = row["importance"]
    memory.embedding_model = row["embedding_model"]
    memory.embedding_state = pb.EMBEDDING_STATE_PENDING if row["pending"] else pb.EMBEDDING_STATE_READY
    set_timestamp(memory.create_time, row["create_time"])
    set_timestamp(memory.update_time, row["update_time"])
    memory.version = row["version"]
    if row["metadata"] != "{}":
        memory.metadata.update(json.loads(row["metadata"]))
    if row["expire_time"] is not None:
        set_timestamp(memory.expire_time, row["expire_time"])
    if include_embedding and row["embedding"] is not None:
        # `.tolist()`, because protobuf fills a repeated field from an array ten times more slowly.
        memory.embedding.extend(row["embedding"].to_numpy().astype(np.float32).tolist())


def to_vector(embedding: Any, precision: Precision) -> HalfVector | Vector:
    """A repeated float field as what the database stores."""
    array = np.array(embedding, dtype=np.float32)
    return HalfVector(array.astype(np.float16)) if precision is Precision.HALF else Vector(array)


def to_json(metadata: struct_pb2.Struct) -> str:
    """A Struct as JSON text for a jsonb parameter."""
    return json.dumps(json_format.MessageToDict(metadata), ensure_ascii=False, allow_nan=False)


def to_timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    """An aware datetime as a message, exact to the microsecond."""
    timestamp = timestamp_pb2.Timestamp()
    set_timestamp(timestamp, moment)
    return timestamp


def set_timestamp(timestamp: timestamp_pb2.Timestamp, moment: datetime) -> None:
    """The same into an existing message."""
    since = (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)) - _EPOCH
    timestamp.seconds = since.days * _DAY_S + since.seconds
    timestamp.nanos = since.microseconds * 1000


def to_microseconds(moment: datetime) -> int:
    """Microseconds since 1970, UTC, of an aware datetime; exact, as a float would not be."""
    if moment.tzinfo is None:
        # asyncpg's form of PostgreSQL's infinity.
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    """The aware datetime, UTC, of microseconds since 1970; the last one of the year 9999 is taken a step earlier."""
    # asyncpg would store datetime.max as infinity.
    return min(_EPOCH + microseconds * _MICROSECOND, _LATEST)
