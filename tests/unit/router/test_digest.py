"""The digest of a store: the same for the same request however it was written down, another for any other."""

from typing import Any

import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb
from router.digest import digest_of
from tests.unit.router.memories import cluster, memories, memory, metadata, struct, taken, with_server_fields

_CLUSTER = cluster()


def _digest(sent: pb.Memory) -> bytes:
    return digest_of(taken(sent, _CLUSTER))


def test_digest_of_a_memory_never_changes() -> None:
    """Rows keep the digest they were stored with: another here would make every late retry a conflict."""
    assert digest_of(memory()).hex() == "4ec61166b5562264237e9cd4ab50bd49cdb5c2008ea29a380b74293db098cfb0"


@given(memories())
def test_same_request_has_the_same_digest_after_a_trip_over_the_wire(sent: pb.Memory) -> None:
    once = taken(sent, _CLUSTER)
    assert digest_of(taken(once, _CLUSTER)) == digest_of(once)
    assert len(digest_of(once)) == 32


@given(metadata, st.randoms(use_true_random=False))
def test_order_of_metadata_does_not_matter(value: struct_pb2.Struct, random: Any) -> None:
    assert _digest(memory(metadata=_shuffled(value, random))) == _digest(memory(metadata=value))


def _shuffled(value: struct_pb2.Struct, random: Any) -> struct_pb2.Struct:
    """The same Struct, its fields put in at another order on every level of structs."""
    names = list(value.fields)
    random.shuffle(names)
    shuffled = struct_pb2.Struct()
    for name in names:
        item = value.fields[name]
        if item.HasField("struct_value"):
            shuffled.fields[name].struct_value.CopyFrom(_shuffled(item.struct_value, random))
            shuffled.fields[name].struct_value.SetInParent()
        else:
            shuffled.fields[name].CopyFrom(item)
    return shuffled


_CHANGES: list[dict[str, Any]] = [
    {"id": "0190b5a4-7b3c-7def-8123-456789abcdee"},
    {"user_id": "user-2"},
    {"user_id": "USER-1"},
    {"agent_id": "agent-2"},
    {"agent_id": None},
    {"session_id": "session-2"},
    {"agent_id": "session-1", "session_id": "agent-1"},
    {"agent_id": "agent-1session-1", "session_id": None},
    {"type": pb.MEMORY_TYPE_EPISODIC},
    {"content": "likes coffee "},
    {"content": "e\u0301"},
    {"content": "\u00e9"},
    {"metadata": None},
    {"metadata": struct({"a": 1})},
    {"metadata": struct({"a": "1", "b": {"c": [True, None, "d"]}})},
    {"metadata": struct({"a": True, "b": {"c": [True, None, "d"]}})},
    {"metadata": struct({"a": 1, "b": {"c": ["d", None, True]}})},
    {"metadata": struct({"a": 1.0000000000000002, "b": {"c": [True, None, "d"]}})},
    {"importance": 0.25000003},
    {"importance": None},
    {"embedding": None},
    {"embedding": [0.5, -0.25, 0.125, 1.0000001]},
    {"embedding": [-0.25, 0.5, 0.125, 1.0]},
    {"expire_time": None},
    {"expire_time": {"seconds": 4_000_000_000, "nanos": 2000}},
    {"expire_time": {"seconds": 4_000_000_001, "nanos": 1000}},
]


def test_any_other_request_has_another_digest() -> None:
    digests = [_digest(memory(**changes)) for changes in [{}, *_CHANGES]]
    twins = [_CHANGES[i - 1] for i in range(len(digests)) if digests[i] in digests[:i]]
    assert twins == []


def test_another_model_has_another_digest() -> None:
    """In a cluster without a model of its own, where callers name theirs."""
    anybodys = cluster(model="")
    models = [taken(memory(embedding_model=name), anybodys) for name in (None, "model-a", "model-b")]
    assert len(set(map(digest_of, models))) == 3


def test_every_field_that_a_caller_sets_is_in_the_digest() -> None:
    """A field that is added to the contract has to be added to the digest, or to the server's own here."""
    servers_own = {"embedding_state", "create_time", "update_time", "version"}
    changed = {name for changes in _CHANGES for name in changes} | {"embedding_model"}
    assert changed | servers_own == set(pb.Memory.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"importance": None}, {"importance": 0.5}, id="default importance"),
        pytest.param({"type": None}, {"type": pb.MEMORY_TYPE_EPISODIC}, id="default type"),
        pytest.param({"metadata": None}, {"metadata": struct({})}, id="no metadata"),
        pytest.param({"embedding_model": None}, {}, id="the cluster's model"),
        pytest.param({"id": "0190B5A4-7B3C-7DEF-8123-456789ABCDEF"}, {}, id="case of the id"),
    ],
)
def test_default_is_the_same_request_as_saying_it(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert _digest(memory(**one)) == _digest(memory(**other))


def test_fields_that_only_the_server_writes_do_not_matter() -> None:
    """A caller may send back what it got."""
    assert _digest(with_server_fields(memory())) == _digest(memory())


def test_embedding_counts_as_it_was_sent_before_rounding() -> None:
    """Two embeddings that are stored alike at half precision are still two requests."""
    assert _digest(memory(embedding=[1, 2, 3, 4])) != _digest(memory(embedding=[1, 2, 3, 4.0001]))
