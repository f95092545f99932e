"""Clusters and valid memories to make tests from."""

import string
from typing import Any

from google.protobuf import struct_pb2
from hypothesis import strategies as st

from common.catalog import Cluster, PlacementStrategy, Precision
from memshard.v1 import memory_pb2 as pb
from router import validate

DIMENSIONS = 4
MODEL = "model-a"

_FLOAT16_MAX = 65504.0


def cluster(precision: Precision = Precision.HALF, model: str = MODEL, key: bytes = b"k" * 32) -> Cluster:
    """A cluster of this precision, with embeddings of four numbers."""
    return Cluster("cluster", model, DIMENSIONS, precision, PlacementStrategy.USER_BASED, "english", key)


def memory(**changes: Any) -> pb.Memory:
    """A valid memory with every field that a caller sets, but for `changes`; None leaves a field out."""
    fields: dict[str, Any] = {
        "id": "0190b5a4-7b3c-7def-8123-456789abcdef",
        "user_id": "user-1",
        "agent_id": "agent-1",
        "session_id": "session-1",
        "type": pb.MEMORY_TYPE_SEMANTIC,
        "content": "likes coffee",
        "metadata": struct({"a": 1, "b": {"c": [True, None, "d"]}}),
        "importance": 0.25,
        "embedding": [0.5, -0.25, 0.125, 1.0],
        "embedding_model": MODEL,
        "expire_time": {"seconds": 4_000_000_000, "nanos": 1000},
        **changes,
    }
    return pb.Memory(**{name: value for name, value in fields.items() if value is not None})


def struct(value: dict[str, Any]) -> struct_pb2.Struct:
    """A Struct from plain values."""
    made = struct_pb2.Struct()
    made.update(value)
    return made


_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_json = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


metadata = st.dictionaries(_text, _json, max_size=4).filter(lambda value: _depth(value) <= 8).map(struct)
embeddings = st.lists(
    st.floats(-_FLOAT16_MAX, _FLOAT16_MAX, width=16), min_size=DIMENSIONS, max_size=DIMENSIONS
).filter(any)
_uuids = st.uuids().map(str)


@st.composite
def memories(draw: st.DrawFn) -> pb.Memory:
    """Any valid memory, with or without each field that may be left out."""

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    return memory(
        id=maybe(_uuids | _uuids.map(str.upper)),
        user_id=draw(_text.filter(bool)),
        agent_id=maybe(_text),
        session_id=maybe(_text),
        type=maybe(st.sampled_from(pb.MemoryType.values())),
        content=draw(_text.filter(bool) | st.text(string.printable, min_size=1000, max_size=2000)),
        metadata=maybe(metadata),
        importance=maybe(st.floats(0, 1, width=32)),
        embedding=maybe(embeddings),
        embedding_model=maybe(st.just(MODEL)),
        expire_time=maybe(
            st.builds(dict, seconds=st.integers(4_000_000_000, 253_402_300_799), nanos=st.integers(0, 999_999_999))
        ),
    )


def with_server_fields(given: pb.Memory) -> pb.Memory:
    """The same memory as a caller sends it who got it from the server: with the fields that only the server writes."""
    sent = pb.Memory()
    sent.CopyFrom(given)
    sent.embedding_state = pb.EMBEDDING_STATE_READY
    sent.create_time.seconds = sent.update_time.seconds = 1
    sent.version = 7
    return sent


def taken(sent: pb.Memory, kind: Cluster) -> pb.Memory:
    """What a router stores of a memory that comes over the wire; what was sent stays as it is."""
    received = pb.Memory.FromString(sent.SerializeToString())
    validate.new_memory(received, kind)
    return received
