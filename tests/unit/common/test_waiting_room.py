"""Bursts wait for their turn, in order; what is more than a burst is refused soon."""

import asyncio
import time

import pytest

from common.errors import ResourceExhausted
from common.limiter import Admission, Limiter, Priority
from common.limiter_settings import LimiterSettings
from common.waiting_room import WaitingRoom
from tests.support.virtual_time import virtual_time


class Place:
    """A limit of four that does not move, and its queue."""

    def __init__(self) -> None:
        self.limiter = Limiter(time.monotonic, LimiterSettings(initial=4, least=4, most=4))
        self.queue = WaitingRoom(self.limiter, time.monotonic)

    async def enter(self, priority: Priority = Priority.INTERACTIVE) -> Admission:
        await self.queue.room(priority)
        return self.limiter.admit("", priority)


@virtual_time
async def test_with_room_nobody_waits() -> None:
    place = Place()
    for _ in range(4):
        await asyncio.wait_for(place.enter(), 0.01)


@virtual_time
async def test_a_burst_gets_its_turns_in_order() -> None:
    place = Place()
    order: list[int] = []

    async def call(number: int) -> None:
        admission = await place.enter()
        order.append(number)
        await asyncio.sleep(0)
        admission.release(0.001)

    await asyncio.gather(*(call(number) for number in range(100)))
    # Those who are woken together may change places.
    assert all(abs(place_ - number) < 4 for place_, number in enumerate(order))
    assert place.limiter.in_flight == 0


@virtual_time
async def test_who_waits_for_too_long_hears_it_in_a_tenth_of_a_second_and_holds_nothing() -> None:
    place = Place()
    held = [await place.enter() for _ in range(4)]
    began = time.monotonic()
    with pytest.raises(ResourceExhausted):
        await place.enter()
    assert time.monotonic() - began == pytest.approx(0.1)
    held[0].release(0.001)
    await asyncio.wait_for(place.enter(), 0.01)


@virtual_time
async def test_once_one_has_waited_in_vain_nobody_waits_until_all_found_room_for_a_second() -> None:
    limiter = Limiter(time.monotonic, LimiterSettings(initial=4, least=4, most=4))
    queue = WaitingRoom(limiter, time.monotonic)
    held = [limiter.admit() for _ in range(4)]

    async def waits() -> bool:
        """Whether one more waits, who finds no room in the end."""
        began = time.monotonic()
        with pytest.raises(ResourceExhausted):
            await queue.room(Priority.INTERACTIVE)
        return time.monotonic() > began

    assert await waits()
    assert [await waits() for _ in range(20)] == [False] * 20
    await asyncio.sleep(0.9)  # Each refusal begins the second anew.
    assert not await waits()
    await asyncio.sleep(0.9)
    assert not await waits()
    held[0].release(0.001)
    await asyncio.wait_for(queue.room(Priority.INTERACTIVE), 0.01)
    limiter.admit()
    await asyncio.sleep(1.01)
    assert await waits()


@virtual_time
async def test_a_batch_that_was_refused_leaves_others_their_burst() -> None:
    place = Place()
    held = [await place.enter() for _ in range(4)]
    with pytest.raises(ResourceExhausted):
        await place.enter(Priority.BATCH)
    turn = asyncio.create_task(place.enter())
    await asyncio.sleep(0)
    held[0].release(0.001)
    assert await asyncio.wait_for(turn, 1)


@virtual_time
async def test_one_who_leaves_makes_way() -> None:
    place = Place()
    held = [await place.enter() for _ in range(4)]
    first, second = asyncio.create_task(place.enter()), asyncio.create_task(place.enter())
    await asyncio.sleep(0)
    first.cancel()
    held[0].release(0.001)
    assert await asyncio.wait_for(second, 1)
    assert first.cancelled() or first.done()


@virtual_time
async def test_the_queue_has_an_end() -> None:
    place = Place()
    for _ in range(4):
        await place.enter()
    waiting = [asyncio.create_task(place.enter()) for _ in range(256)]
    await asyncio.sleep(0)
    began = time.monotonic()
    with pytest.raises(ResourceExhausted):
        await place.enter()
    assert time.monotonic() == began
    await asyncio.gather(*waiting, return_exceptions=True)


@virtual_time
async def test_who_could_not_have_a_turn_in_time_does_not_wait_for_one() -> None:
    place = Place()
    held = [await place.enter() for _ in range(4)]
    place.limiter.busy_per_s = 30.0  # Three in a tenth of a second.
    waiting = [asyncio.create_task(place.enter()) for _ in range(3)]
    await asyncio.sleep(0)
    began = time.monotonic()
    with pytest.raises(ResourceExhausted):
        await place.enter()
    assert time.monotonic() == began
    for one in held[:3]:
        one.release(0.001)
    assert len(await asyncio.wait_for(asyncio.gather(*waiting), 1)) == 3


@virtual_time
async def test_a_batch_that_waits_keeps_nobody_else_out() -> None:
    limiter = Limiter(time.monotonic, LimiterSettings(initial=10, least=10, most=10))
    queue = WaitingRoom(limiter, time.monotonic)
    held = [limiter.admit() for _ in range(8)]
    batch = asyncio.create_task(queue.room(Priority.BATCH))
    await asyncio.sleep(0)
    # Batches have seven places of ten, which are taken; the other three are not theirs to wait in front of.
    await asyncio.wait_for(queue.room(Priority.INTERACTIVE), 0.01)
    for admission in held[:2]:
        admission.release(0.001)
    await asyncio.wait_for(batch, 0.05)
