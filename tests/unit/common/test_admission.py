"""The limit of a server for all its calls: who is refused is counted."""

import pytest

from common.admission import Admission
from common.errors import ResourceExhausted
from common.telemetry.registry import REGISTRY


def shed() -> float:
    count = REGISTRY.get_sample_value("memory_requests_shed_total", {"at": "admission"})
    assert count is not None, "a counter that is not there from the beginning hides its first increase"
    return count


async def test_who_finds_no_room_is_counted_and_nobody_else() -> None:
    admission, before = Admission(free=frozenset({"Describe"})), shed()
    while admission.limiter.has_room():
        await admission.room("Get")
        admission.limiter.admit("Get")
    assert shed() == before
    # In the queue, and for who does not wait in it.
    with pytest.raises(ResourceExhausted):
        await admission.room("Get")
    assert shed() == before + 1
    with pytest.raises(ResourceExhausted), admission.of("Get"):
        pass
    assert shed() == before + 2
    # What is refused within a call is somebody else's refusal.
    await admission.room("Describe")
    with pytest.raises(ResourceExhausted), admission.of("Describe"):
        raise ResourceExhausted("of the database")
    assert shed() == before + 2
