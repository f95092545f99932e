"""What a store answers: the memory as it was sent, without its embedding, whatever fields the contract has."""

from datetime import UTC, datetime

import pytest

from memshard.v1 import memory_pb2 as pb
from shard import store
from shard.rows import set_timestamp
from tests.unit.router.memories import memory

_MADE = datetime(2026, 11, 20, 19, 30, 1, 234567, tzinfo=UTC)


@pytest.mark.parametrize("without", [None, "metadata", "expire_time", "embedding", "importance"])
def test_what_was_stored_is_answered_field_by_field(without: str | None) -> None:
    sent = memory()
    if without is not None:
        sent.ClearField(without)  # type: ignore[arg-type]  # A name from above.
    expected = pb.Memory()
    expected.CopyFrom(sent)
    expected.ClearField("embedding")
    expected.embedding_state = pb.EMBEDDING_STATE_READY if sent.embedding else pb.EMBEDDING_STATE_PENDING
    expected.version = 1
    set_timestamp(expected.create_time, _MADE)
    set_timestamp(expected.update_time, _MADE)
    row = {"create_time": _MADE, "update_time": _MADE, "version": 1}
    assert store._as_stored(sent, row) == expected  # type: ignore[arg-type]  # A row is read by name, as this is.


def test_no_field_of_the_contract_is_forgotten() -> None:
    answered = {"id", "user_id", "agent_id", "session_id", "type", "content", "metadata", "importance"}
    answered |= {"embedding_model", "embedding_state", "create_time", "update_time", "expire_time", "version"}
    assert {field.name for field in pb.Memory.DESCRIPTOR.fields} == answered | {"embedding"}
