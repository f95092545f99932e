"""Moves of one mover hand over one after the other, and what is not urgent waits for them."""

import asyncio

from shard.moving.moving import Turn


async def _ends(task: "asyncio.Task[None]") -> bool:
    """Whether it ends by itself, without anything else being done."""
    done, _ = await asyncio.wait({task}, timeout=0.01)
    return bool(done)


async def test_one_has_its_turn_and_the_next_waits_for_its_end() -> None:
    lock = asyncio.Lock()
    first, second = Turn(lock), Turn(lock)
    await first.take()
    await first.take()  # It is its turn already.
    waiting = asyncio.create_task(second.take())
    assert not await _ends(waiting)
    first.end()
    await asyncio.wait_for(waiting, 1)
    first.end()  # It is the other's turn, which this does not end.
    waiting = asyncio.create_task(first.take())
    assert not await _ends(waiting)
    second.end()
    await asyncio.wait_for(waiting, 1)


async def test_what_is_not_urgent_waits_for_others_and_not_for_its_own_turn() -> None:
    lock = asyncio.Lock()
    first, second = Turn(lock), Turn(lock)
    await asyncio.wait_for(first.others(), 1)
    await first.take()
    await asyncio.wait_for(first.others(), 1)
    waiting = asyncio.create_task(second.others())
    assert not await _ends(waiting)
    first.end()
    await asyncio.wait_for(waiting, 1)
    await asyncio.wait_for(first.take(), 1)  # Whoever let it pass has taken nothing.


async def test_a_turn_that_nobody_waits_for_any_more_goes_to_the_next() -> None:
    lock = asyncio.Lock()
    first, second, third = Turn(lock), Turn(lock), Turn(lock)
    await first.take()
    gone, waiting = asyncio.create_task(second.take()), asyncio.create_task(third.take())
    assert not await _ends(waiting)
    gone.cancel()
    assert await _ends(gone)
    second.end()  # As its mover does on its way out.
    first.end()
    await asyncio.wait_for(waiting, 1)
