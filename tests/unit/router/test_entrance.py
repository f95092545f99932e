"""What the way in takes for work of its own process."""

import asyncio
import time
from contextlib import ExitStack, suppress

import pytest

from common.errors import ResourceExhausted
from common.limiter import Priority
from common.shedder import Shedder
from common.window import SlidingCount
from router.entrance import Entrance
from tests.support.eventually import eventually

CALLS = 40


async def test_calls_that_hang_are_no_work_after_a_moment() -> None:
    now = [0.0]
    entrance = Entrance(SlidingCount(1, 10, time.monotonic), clock=lambda: now[0])
    looking = asyncio.create_task(entrance.run())
    try:
        with ExitStack() as calls:
            for _ in range(CALLS):
                calls.enter_context(entrance.of("GetMemory"))
            await eventually(lambda: entrance.shedder.at_work == CALLS, within_s=5)
            now[0] += 1
            await eventually(lambda: entrance.shedder.at_work == 0, within_s=5)
            with entrance.of("GetMemory"):
                await eventually(lambda: entrance.shedder.at_work == 1, within_s=5)
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking


class Full(Shedder):
    """Lets nobody in but batches, so that it is seen who is counted."""

    def admits(self, priority: Priority = Priority.INTERACTIVE) -> bool:
        return priority is Priority.BATCH


async def test_whoever_is_refused_is_counted_for_good_and_nobody_else() -> None:
    now = [0.0]
    entrance = Entrance(SlidingCount(1, 10, lambda: now[0]), Full())
    for _ in range(3):
        with pytest.raises(ResourceExhausted):
            await entrance.room("GetMemory")
        await entrance.room("BatchStoreMemories")
    assert (entrance.shed.total(), entrance.shed_ever) == (3, 3)
    now[0] += 60
    assert (entrance.shed.total(), entrance.shed_ever) == (0, 3)
