"""One budget of time, on the loop's clock."""

import asyncio

import pytest

from common.deadline import Deadline


async def test_remaining_time_shrinks_and_never_falls_below_zero() -> None:
    deadline = Deadline.after(30)
    first = deadline.remaining_s()
    await asyncio.sleep(0)
    assert 0 < deadline.remaining_s() <= first <= 30
    assert Deadline.after(-5).remaining_s() == 0


async def test_next_hop_has_the_margin_less() -> None:
    deadline = Deadline.after(30)
    assert deadline.less(0.5).at == deadline.at - 0.5
    assert Deadline.after(0.1).less(0.5).remaining_s() == 0


async def test_work_is_cut_off_at_the_deadline() -> None:
    cleaned_up = False

    async def work() -> None:
        nonlocal cleaned_up
        async with Deadline.after(0.01).bound():
            try:
                await asyncio.Event().wait()
            finally:
                cleaned_up = True

    with pytest.raises(TimeoutError):
        await work()
    assert cleaned_up


async def test_deadline_that_has_passed_cuts_off_the_first_wait() -> None:
    with pytest.raises(TimeoutError):
        async with Deadline.after(-1).bound():
            await asyncio.Event().wait()


async def test_work_within_the_deadline_is_left_alone() -> None:
    async with Deadline.after(30).bound():
        answer = await asyncio.sleep(0, "done")
    assert answer == "done"
