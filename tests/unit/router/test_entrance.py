"""What the way in takes for work of its own process."""

import asyncio
import time
from contextlib import ExitStack, suppress

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
