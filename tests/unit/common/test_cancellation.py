"""A cancellation that somebody swallowed is noticed by those who ask."""

import asyncio

import pytest

from common.cancellation import raise_if_cancelled, requested


async def _swallows() -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        """As asyncio.wait_for does when there is a result as well."""


async def test_a_loop_around_what_swallows_cancellations_ends() -> None:
    async def loop() -> None:
        while True:
            raise_if_cancelled()
            await _swallows()

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_only_what_was_asked_since_counts() -> None:
    async def work() -> str:
        await _swallows()
        before = requested()
        raise_if_cancelled(since=before)
        await _swallows()
        with pytest.raises(asyncio.CancelledError):
            raise_if_cancelled(since=before)
        return "all of it"

    task = asyncio.create_task(work())
    for _ in range(2):
        await asyncio.sleep(0)
        task.cancel()
    assert await task == "all of it"
