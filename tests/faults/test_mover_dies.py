"""The mover is killed, or told to end, at every step of a move, while the slots are written; then it is resumed or
rolled back. Nothing is lost, nothing is there twice, and nothing is left behind.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from common.moves import Step
from shard.moving.steps import STEPS
from tests.support.cluster import LocalCluster
from tests.support.moving import Slots
from tests.support.writers import Writers

_USERS = [f"carried-{number}" for number in range(40)]
# A third of one shard's slots.
_RANGE = (9000, 11500)
_HELD_S = 3600

_STEPS = [step for step in Step if not step.is_final]
# From here on the way back is closed.
_TOO_LATE = (Step.CLEANING,)
# What comes after a rollback was asked for.
_WAY_BACK = (Step.RETURNING, Step.RETURNED, Step.ROLLING_BACK)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slots() -> AsyncIterator[Slots]:
    async with LocalCluster(shards=2) as cluster:
        yield Slots(cluster, {"rollback_window_s": _HELD_S, "max_slots": 16384})


@asynccontextmanager
async def written(slots: Slots) -> AsyncIterator[None]:
    """Writers at work; at the end everything that they wrote must be there, and nothing else be left."""
    writers = Writers(slots.cluster.address, _USERS)
    writers.expected = _known
    async with asyncio.TaskGroup() as group:
        group.create_task(writers.run(3))
        try:
            yield
        finally:
            writers.stop()
    assert (writers.failures, writers.wrong) == ([], [])
    assert await writers.found() == writers.expected
    assert await slots.left_over() == []


_known: dict[str, dict[str, str]] = {}


def test_every_step_has_something_that_is_done_in_it() -> None:
    """And so is among those that the mover is killed at below."""
    assert list(STEPS) == _STEPS


async def there_and_back(slots: Slots) -> tuple[str, str]:
    """The shard that has the range, and the other."""
    source = (await slots.topology()).owner(_RANGE[0]).shard_id
    return source, next(shard for shard in ("shard-0", "shard-1") if shard != source)


async def stopped_at(slots: Slots, step: Step, number: int, target: str) -> None:
    """A mover begins to move the range to `target`, and gets a signal when it is at `step`."""
    asked = ["move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target]
    if step in (Step.RETURNING, Step.RETURNED, Step.ROLLING_BACK):
        # One that is to go back has to have gone, or have begun to.
        begun = Step.COPYING if step is Step.ROLLING_BACK else Step.ACTIVE
        async with slots.mover(*asked) as mover:
            await mover.until(begun)
            mover.send(signal.SIGTERM)
            await mover.process.communicate()
        asked = ["rollback", "--move", str((await slots.moves())[-1].move_id)]
    elif step is Step.CLEANING:
        slots = Slots(slots.cluster, {**slots.settings, "rollback_window_s": 0})
    async with slots.mover(*asked) as mover:
        await mover.until(step)
        mover.send(number)
        await mover.process.communicate()


async def finished(slots: Slots, *command: str) -> None:
    await Slots(slots.cluster, {**slots.settings, "rollback_window_s": 0}).move(*command)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
@pytest.mark.parametrize("step", _STEPS)
async def test_a_move_is_resumed(slots: Slots, step: Step, number: int) -> None:
    source, target = await there_and_back(slots)
    async with written(slots):
        await stopped_at(slots, step, number, target)
        await finished(slots, "resume")
        move = (await slots.moves())[-1]
        ends = Step.ROLLED_BACK if step in _WAY_BACK else Step.DONE
        assert move.step is ends
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == (source if step in _WAY_BACK else target)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
@pytest.mark.parametrize("step", [step for step in _STEPS if step not in _TOO_LATE])
async def test_a_move_is_rolled_back(slots: Slots, step: Step, number: int) -> None:
    source, target = await there_and_back(slots)
    async with written(slots):
        await stopped_at(slots, step, number, target)
        move = (await slots.moves())[-1]
        if not move.step.is_final:
            await finished(slots, "rollback", "--move", str(move.move_id))
        assert (await slots.moves())[-1].step is Step.ROLLED_BACK
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == source


async def test_a_rollback_that_comes_too_late_says_so(slots: Slots) -> None:
    _, target = await there_and_back(slots)
    await finished(slots, "move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target)
    move = (await slots.moves())[-1]
    async with slots.mover("rollback", "--move", str(move.move_id)) as mover:
        (event,) = [event async for event in mover.events()]
    assert event["event"] == "failed"
    assert "way back is closed" in event["why"]
