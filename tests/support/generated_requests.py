"""Requests for every rpc that nobody wrote: good ones, ones with a few things wrong, wild ones, and bytes of no kind.

Most values come from small pools, so that requests meet: the same few users and ids are stored, changed, listed, found
and erased again and again.
"""

import math
import struct
import uuid
from typing import Any, TypeAlias, cast

from google.protobuf import duration_pb2, field_mask_pb2, struct_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb

Generated: TypeAlias = tuple[str, bytes]
"""The name of an rpc, and the bytes to send to it."""

_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
_DIMENSIONS = 256
_RPCS = {method.name: getattr(pb, method.input_type.name) for method in _SERVICE.methods}
_NOW_S = 4_000_000_000  # In the year 2096: an expiry that has not come.

_users = st.sampled_from(["fuzz-a", "fuzz-A", "fuzz-a%", "fuzz-a_", "fuzz-é", "fuzz-e\u0301"])
_ids = st.sampled_from([str(uuid.UUID(int=n)) for n in range(12)]) | st.sampled_from([str(uuid.UUID(int=1 << 127))])
_texts = st.sampled_from(
    ["likes green tea", "the key is under the mat", "茶", "100% of a_b\\c 'quoted' \"twice\"", "!"]
)
_names = st.sampled_from(["", "bot", "a%", "'; DROP TABLE memories; --"])
_keys = st.sampled_from(["topic", "n", "tags", "a.b", "", "'", '"', "\\", "${}", "$1", "é"])
_plain = st.sampled_from([None, True, 0, 1, 1.5, -0.0, 1e308, 5e-324, 2.0**53, "tea", "", "5", "\\u0000", "'"])
_json = st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3), max_leaves=5
)
_vectors = st.sampled_from([0.5, -1.0, 65_504.0, 6e-8]).map(lambda x: [x] + [0.25] * (_DIMENSIONS - 1))
_counts = st.sampled_from([0, 1, 2, 100, 1000])
_MASKED = ["content", "metadata", "importance", "type", "agent_id", "session_id", "embedding", "expire_time"]

_characters = st.characters(exclude_categories=["Cs"])  # Lone surrogates cannot be sent.

# What is wrong with a value, by the type of its field.
_WILD_TEXT = ["", "\0", "x" * 300, "y" * 70_000, "some-id", "\uffff", "A" * 88, "\u202e", "%s%n", "memory.content"]
_WILD_NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 2.0, 1e300, -0.0, 5e-324, 65_520.0, 3.4e38]
_WILD_INTEGERS = [-1, 0, 1, 3, 99, 1001, 2**31 - 1, -(2**31)]
_MAX_BYTES = 4 * 1024 * 1024  # In one field; a router takes requests of 16 MiB.
_WILD_LONGS = [*_WILD_INTEGERS, 2**63 - 1, -(2**63), 253_402_300_800, -62_135_596_801]


def requests() -> st.SearchStrategy[Generated]:
    """One request, of any kind to any rpc."""
    good = st.sampled_from(sorted(_GOOD)).flatmap(lambda rpc: st.tuples(st.just(rpc), _GOOD[rpc]))
    wild = st.sampled_from(sorted(_RPCS)).flatmap(lambda rpc: st.tuples(st.just(rpc), _wild(_RPCS[rpc].DESCRIPTOR, 0)))
    raw = st.tuples(st.sampled_from(sorted(_RPCS)), st.binary(max_size=60))
    return st.one_of(
        good.map(_sent),
        good.map(_sent),
        good.flatmap(_spoilt),
        good.flatmap(_spoilt),
        wild.map(_sent),
        raw,
        good.flatmap(_mangled),
    )


def _sent(request: tuple[str, Message]) -> Generated:
    return request[0], request[1].SerializeToString()


def _value(plain: Any) -> struct_pb2.Value:
    """JSON-like data as a message."""
    match plain:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=plain)
        case str():
            return struct_pb2.Value(string_value=plain)
        case list():
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[_value(item) for item in plain]))
        case dict():
            return struct_pb2.Value(struct_value=_struct(plain))
    return struct_pb2.Value(number_value=plain)


def _struct(plain: dict[str, Any]) -> struct_pb2.Struct:
    return struct_pb2.Struct(fields={key: _value(item) for key, item in plain.items()})


def _build(kind: type[Message], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A message with these fields; None leaves one out."""
    given = st.fixed_dictionaries(fields)
    return given.map(lambda values: kind(**{name: value for name, value in values.items() if value is not None}))


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


_comparisons = _build(
    pb.Comparison,
    field=st.sampled_from(
        ["metadata.topic", "metadata.n", "metadata.a.b", "metadata.'", "agent_id", "type", "importance", "create_time"]
    ),
    operator=st.sampled_from(range(1, 11)),
    value=_maybe((_json | st.sampled_from(["2030-01-01T00:00:00Z", "SEMANTIC"])).map(_value)),
)
_filters = st.recursive(
    _comparisons.map(lambda comparison: pb.Filter(comparison=comparison)),
    lambda inner: st.one_of(
        inner.map(lambda filter: pb.Filter(negation=filter)),
        st.lists(inner, min_size=1, max_size=3).map(lambda f: pb.Filter(all_of=pb.FilterList(filters=f))),
        st.lists(inner, min_size=1, max_size=3).map(lambda f: pb.Filter(any_of=pb.FilterList(filters=f))),
    ),
    max_leaves=4,
)
_memories = _build(
    pb.Memory,
    id=_maybe(_ids),
    user_id=_users,
    agent_id=_names,
    session_id=_names,
    type=st.sampled_from(range(5)),
    content=_texts,
    metadata=_maybe(st.dictionaries(_keys, _json, max_size=3).map(_struct)),
    importance=_maybe(st.sampled_from([0.0, 0.3, 1.0])),
    embedding=_maybe(_vectors),
    expire_time=_maybe(st.just(timestamp_pb2.Timestamp(seconds=_NOW_S, nanos=999_999_999))),
)
_reads = _build(
    pb.ReadOptions,
    level=st.sampled_from(range(5)),
    max_staleness=st.just(duration_pb2.Duration(seconds=5)),
)
_GOOD: dict[str, st.SearchStrategy[Any]] = {
    "StoreMemory": _build(pb.StoreMemoryRequest, memory=_memories),
    "BatchStoreMemories": _build(pb.BatchStoreMemoriesRequest, memories=st.lists(_memories, min_size=1, max_size=6)),
    "GetMemory": _build(
        pb.GetMemoryRequest, id=_ids, user_id=_maybe(_users), include_embedding=st.booleans(), read=_maybe(_reads)
    ),
    "UpdateMemory": _build(
        pb.UpdateMemoryRequest,
        memory=_build(
            pb.Memory, id=_ids, user_id=_users, content=_texts, importance=st.just(0.7), embedding=_maybe(_vectors)
        ),
        update_mask=st.lists(st.sampled_from(_MASKED), min_size=1, max_size=3).map(
            lambda paths: field_mask_pb2.FieldMask(paths=paths)
        ),
        expected_version=_maybe(st.sampled_from([1, 2, 3])),
        request_id=_names,
    ),
    "DeleteMemory": _build(pb.DeleteMemoryRequest, id=_ids, user_id=_users, request_id=_names),
    "ListMemories": _build(
        pb.ListMemoriesRequest,
        user_id=_users,
        filter=_maybe(_filters),
        page_size=_counts,
        include_embedding=st.booleans(),
        read=_maybe(_reads),
    ),
    "ListMemoryVersions": _build(pb.ListMemoryVersionsRequest, id=_ids, user_id=_users, page_size=_counts),
    "SearchMemories": _build(
        pb.SearchMemoriesRequest,
        user_id=_maybe(_users),
        query=_texts | st.sampled_from(["the of", "tea & !key | (", "'", "a:*", "<->", "%"]),
        embedding=_maybe(_vectors),
        limit=_counts,
        filter=_maybe(_filters),
        mode=st.sampled_from(range(4)),
        min_score=_maybe(st.sampled_from([-2.0, 0.0, 0.9])),
        read=_maybe(_reads),
        require_all_shards=st.booleans(),
    ),
    "EraseUser": _build(pb.EraseUserRequest, user_id=_users, request_id=_names),
}


@st.composite
def _spoilt(draw: st.DrawFn, request: tuple[str, Message]) -> Generated:
    """The request with one to three fields, anywhere in it, set to something strange."""
    rpc, good = request
    spoilt = type(good)()
    spoilt.CopyFrom(good)
    for _ in range(draw(st.integers(1, 3))):
        messages = _messages_in(spoilt)
        message = messages[draw(st.integers(0, len(messages) - 1))]
        fields = message.DESCRIPTOR.fields
        field = cast(FieldDescriptor, fields[draw(st.integers(0, len(fields) - 1))])
        if not _is_map(field):
            value = draw(_strange(field, 0))
            message.ClearField(field.name)
            if field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated:
                getattr(message, field.name).CopyFrom(value)
            elif field.is_repeated:
                times = draw(st.sampled_from([1, 2, 70, 600]))
                getattr(message, field.name).extend([value] * min(times, max(1, _MAX_BYTES // _size(value))))
            else:
                setattr(message, field.name, value)
    return _sent((rpc, spoilt))


def _size(value: Any) -> int:
    """About how many bytes a value takes."""
    return (value.ByteSize() if isinstance(value, Message) else len(str(value))) or 1


def _messages_in(message: Message) -> list[Message]:
    """The message and those in it, down to where values begin."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and not _is_map(field):
            for inner in value if field.is_repeated else [value]:
                found += _messages_in(inner)
    return found


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _strange(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """A value that a field of this type can hold, and probably should not."""
    if field.message_type is not None:
        return _wild(field.message_type, depth + 1)
    return _STRANGE.get(field.type, st.sampled_from(_WILD_INTEGERS))


_STRANGE: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.sampled_from(_WILD_TEXT) | st.text(_characters, max_size=8),
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=80),
    FieldDescriptor.TYPE_FLOAT: st.sampled_from(_WILD_NUMBERS) | st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from(_WILD_NUMBERS) | st.floats(),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT64: st.sampled_from(_WILD_LONGS),
}


def _wild(descriptor: Descriptor, depth: int) -> st.SearchStrategy[Message]:
    """A message with any of its fields, each with any value."""
    return st.deferred(lambda: _wild_message(descriptor, depth))


@st.composite
def _wild_message(draw: st.DrawFn, descriptor: Descriptor, depth: int) -> Message:
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if not _is_map(field) and (depth < 4 or field.message_type is None)]
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda f: f.name)) if fields else []:
        value = draw(_strange(field, depth))
        if field.is_repeated:
            getattr(message, field.name).extend([value] * draw(st.sampled_from([0, 1, 3])))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(value)
        else:
            setattr(message, field.name, value)
    return message


@st.composite
def _mangled(draw: st.DrawFn, request: tuple[str, Message]) -> Generated:
    """The bytes of a request with some cut out, put in, or changed."""
    rpc, good = request
    data = bytearray(good.SerializeToString())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "insert", "change", "length"])):
            case "cut":
                del data[at : at + draw(st.integers(1, 20))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "change":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case _:
                data[at:at] = b"\x0a" + struct.pack("<I", draw(st.integers(0, 2**32 - 1)))
    return rpc, bytes(data)
