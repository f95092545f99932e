"""The mover is killed, or told to end, at every step of a move, while the slots are written; then it is resumed or
rolled back. Nothing is lost, nothing is there twice, and nothing is left behind.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import pytest
import pytest_asyncio
from _pytest.mark.structures import ParameterSet

from common.moves import Step
from shard.moving.steps import STEPS
from tests.support.cluster import LocalCluster
from tests.support.end_state import check_everything, wrong
from tests.support.history import History
from tests.support.moving import Slots
from tests.support.readers import Readers
from tests.support.writers import Answered, Writers

_USERS = [f"carried-{number}" for number in range(40)]
# A third of one shard's slots.
_RANGE = (9000, 11500)
_HELD_S = 3600
_FENCE_TIMEOUT_MS = 5000
# Each test moves what the ones before it have left, so there must not be too much of it.
_WRITERS, _PAUSE_S = 3, 0.05
_READERS, _READ_PAUSE_S = 2, 0.1
_FETCHES, _SEARCHES = 2, 5

_STEPS = [step for step in Step if not step.is_final]
# From here on the way back is closed.
_TOO_LATE = (Step.CLEANING,)
# What comes after a rollback was asked for.
_WAY_BACK = (Step.RETURNING, Step.RETURNED, Step.ROLLING_BACK)
# Where nobody takes writes, or the catalog has just said who does: told to end there, a mover first comes to these.
_GOES_ON = {
    Step.FENCED: Step.ACTIVE,
    Step.CUT_OVER: Step.ACTIVE,
    Step.RETURNING: Step.ROLLING_BACK,
    Step.RETURNED: Step.ROLLING_BACK,
}


class End(StrEnum):
    """How a mover ends in a step: it cannot have left it."""

    KILLED_EARLY = "killed when it has begun it"
    KILLED_LATE = "killed when all but the record is done"
    TOLD = "told to end"


def _ends(steps: Sequence[Step], short: End) -> list[ParameterSet]:
    """Every end in each of the steps. The suite has each step with the end `short`, and two in which the mover is told
    to end; all of them are in `make faults`.
    """
    kept = {(step, short) for step in steps}
    kept |= {(step, End.TOLD) for step in (Step.COPYING, Step.FENCED)}
    # Active is the one step that waits, and for much longer than a test lasts.
    if (Step.ACTIVE, End.KILLED_LATE) in kept:
        kept.add((Step.ACTIVE, End.KILLED_EARLY))
    return [
        pytest.param(step, end, marks=() if (step, end) in kept else pytest.mark.slow)
        for step in steps
        for end in End
        if (step, end) != (Step.ACTIVE, End.KILLED_LATE)
    ]


@dataclass
class Carried:
    """What the tests have stored so far, by user, as its writers know it."""

    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=lambda: {user: History() for user in _USERS})
    answered: dict[str, dict[str, Answered]] = field(default_factory=dict)


_carried = Carried()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slots() -> AsyncIterator[Slots]:
    async with LocalCluster(shards=2) as cluster:
        yield Slots(cluster, {"rollback_window_s": _HELD_S, "max_slots": 16384})


@asynccontextmanager
async def written(slots: Slots) -> AsyncIterator[None]:
    """Writers and readers at work; at the end everything that was written must be there, once and as it was written,
    with versions, tombstones and request ids, and nothing else be left.
    """
    writers = Writers(slots.cluster.address, _USERS, pause_s=_PAUSE_S)
    writers.expected, writers.histories, writers.answered = _carried.expected, _carried.histories, _carried.answered
    readers = Readers(writers, pause_s=_READ_PAUSE_S)
    async with asyncio.TaskGroup() as group:
        group.create_task(writers.run(_WRITERS))
        group.create_task(readers.run(_READERS))
        try:
            yield
        finally:
            writers.stop()
            readers.stop = True
    assert (writers.failures, writers.wrong, readers.failures, readers.incomplete) == ([], [], [], 0)
    assert readers.reads > 0
    await check_everything(slots.cluster, writers, fetches=_FETCHES, searches=_SEARCHES)
    assert wrong(writers) == {}
    assert await slots.left_over() == []


def test_every_step_has_something_that_is_done_in_it() -> None:
    """And so is among those that the mover is killed at below."""
    assert list(STEPS) == _STEPS


async def there_and_back(slots: Slots) -> tuple[str, str]:
    """The shard that has the range, and the other."""
    source = (await slots.topology()).owner(_RANGE[0]).shard_id
    return source, next(shard for shard in ("shard-0", "shard-1") if shard != source)


async def stopped_at(slots: Slots, step: Step, end: End, target: str) -> None:
    """A mover begins to move the range to `target`, and ends at `step`, which is what the catalog has then."""
    asked = ["move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target]
    if step in _WAY_BACK:
        # One that is to go back has to have gone, or have begun to.
        begun = Step.COPYING if step is Step.ROLLING_BACK else Step.ACTIVE
        async with slots.mover(*asked) as mover:
            await mover.until(begun)
            mover.send(signal.SIGTERM)
            await mover.process.communicate()
        asked = ["rollback", "--move", str((await slots.moves())[-1].move_id)]
    elif step is Step.CLEANING:
        slots = Slots(slots.cluster, {**slots.settings, "rollback_window_s": 0})
    async with slots.step_held(step) as held, slots.mover(*asked) as mover:
        await mover.until(step)
        if end is End.KILLED_LATE or (end is End.TOLD and step in _GOES_ON):
            await held.is_done()
        if end is End.TOLD:
            mover.send(signal.SIGTERM)
            if step in _GOES_ON:
                await held.release()
            await mover.process.communicate()
            assert (await slots.moves())[-1].step is _GOES_ON.get(step, step)
        else:
            mover.send(signal.SIGKILL)
            await mover.process.communicate()
            await held.end_sessions()
            assert (await slots.moves())[-1].step is step


async def finished(slots: Slots, *command: str) -> None:
    if command[0] == "resume":
        command = (*command, "--rollback-window", "0")
    await Slots(slots.cluster, {**slots.settings, "rollback_window_s": 0}).move(*command)


@pytest.mark.parametrize(("step", "end"), _ends(_STEPS, End.KILLED_LATE))
async def test_a_move_is_resumed(slots: Slots, step: Step, end: End) -> None:
    source, target = await there_and_back(slots)
    async with written(slots):
        await stopped_at(slots, step, end, target)
        await finished(slots, "resume")
        move = (await slots.moves())[-1]
        ends = Step.ROLLED_BACK if step in _WAY_BACK else Step.DONE
        assert move.step is ends
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == (source if step in _WAY_BACK else target)


@pytest.mark.parametrize(("step", "end"), _ends([step for step in _STEPS if step not in _TOO_LATE], End.KILLED_EARLY))
async def test_a_move_is_rolled_back(slots: Slots, step: Step, end: End) -> None:
    source, target = await there_and_back(slots)
    async with written(slots):
        await stopped_at(slots, step, end, target)
        move = (await slots.moves())[-1]
        if not move.step.is_final:
            await finished(slots, "rollback", "--move", str(move.move_id))
        assert (await slots.moves())[-1].step is Step.ROLLED_BACK
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == source


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
@pytest.mark.parametrize("command", ["resume", "rollback"])
async def test_a_mover_ends_while_nobody_may_write(slots: Slots, command: str, number: int) -> None:
    """The source has fenced the slots, and the catalog has not been asked to hand them over: nobody but a mover can see
    to it that they take writes again.
    """
    source, target = await there_and_back(slots)
    asked = ["move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target]
    async with written(slots):
        async with slots.mover(*asked) as mover, slots.fence_held(mover, source, target):
            move = (await slots.moves())[-1]
            assert (move.step, move.fenced_at is None) == (Step.FENCED, False)
            mover.send(number)
            if number == signal.SIGKILL:
                await mover.process.communicate()
                assert await slots.fenced(source) == move.slots
            else:
                # It does not leave it so: what takes too long is given up, and the slots are given back.
                told, _ = await mover.process.communicate()
                pauses = [json.loads(line).get("pause_ms", 0) for line in told.splitlines()]
                assert max(pauses) >= _FENCE_TIMEOUT_MS / 2, "a pause that led to nothing is one all the same"
                assert await slots.fenced(source) == 0
                assert (await slots.moves())[-1].step is Step.VERIFYING
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == source
        await finished(slots, command, *(["--move", str(move.move_id)] if command == "rollback" else []))
        moved = command == "resume"
        assert (await slots.moves())[-1].step is (Step.DONE if moved else Step.ROLLED_BACK)
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == (target if moved else source)


@pytest.mark.parametrize("command", ["resume", "rollback"])
async def test_a_mover_that_hangs_while_nobody_may_write_keeps_nobody_from_it_for_long(
    slots: Slots, command: str
) -> None:
    """Its sessions are ended: it has lost the right to change anything, and when it wakes finds what others did."""
    source, target = await there_and_back(slots)
    asked = ["move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target]
    async with written(slots), slots.mover(*asked) as mover:
        async with slots.fence_held(mover, source, target):
            mover.send(signal.SIGSTOP)
            move = (await slots.moves())[-1]
            assert (move.step, move.fenced_at is None) == (Step.FENCED, False)
            # The shorter the fences that it knows, the earlier it takes a mover for one that hangs.
            await Slots(slots.cluster, {**slots.settings, "fence_timeout_s": 0.5}).move("recover")
            assert await slots.fenced(source) == 0
            recovered = (await slots.moves())[-1]
            assert (recovered.step, recovered.may_be_fenced) == (Step.VERIFYING, False)
        await finished(slots, command, *(["--move", str(move.move_id)] if command == "rollback" else []))
        moved = command == "resume"
        ended = (await slots.moves())[-1]
        assert ended.step is (Step.DONE if moved else Step.ROLLED_BACK)
        mover.send(signal.SIGCONT)
        events = [event async for event in mover.events()]
        assert events[-1]["event"] == ("done" if moved else "failed"), events[-1]
        assert moved or "was rolled back" in events[-1]["why"]
        assert (await slots.moves())[-1] == ended
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == (target if moved else source)


@pytest.mark.parametrize("told", ["nobody", "who gives"])
@pytest.mark.parametrize(
    ("step", "command"), [(Step.CUT_OVER, "resume"), (Step.CUT_OVER, "rollback"), (Step.RETURNED, "resume")]
)
async def test_a_mover_dies_before_both_shards_know_what_the_catalog_says(
    slots: Slots, step: Step, command: str, told: str
) -> None:
    """Nobody takes writes then: who gives the slots up is fenced, or sends callers to one who is not told yet."""
    source, target = await there_and_back(slots)
    async with written(slots):
        asked = ["move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target]
        giver, taker = source, target
        if step is Step.RETURNED:
            async with slots.mover(*asked) as mover:
                await mover.until(Step.ACTIVE)
                mover.send(signal.SIGTERM)
                await mover.process.communicate()
            asked = ["rollback", "--move", str((await slots.moves())[-1].move_id)]
            giver, taker = target, source
        fenced_at = Step.RETURNING if step is Step.RETURNED else Step.FENCED
        async with (
            slots.mover(*asked) as mover,
            slots.untold(mover, giver, giver if told == "nobody" else taker, fenced_at) as untold,
        ):
            await mover.until(step)
            teller = await untold.teller()
            mover.send(signal.SIGKILL)
            await mover.process.communicate()
            await untold.is_gone(teller)
            move = (await slots.moves())[-1]
            assert (move.step, move.fenced_at is None) == (step, False)
            assert (await slots.topology()).owner(_RANGE[0]).shard_id == taker
            assert await slots.fenced(giver) == (move.slots if told == "nobody" else 0)
            assert await slots.fenced(taker) == move.slots
        await finished(slots, command, *(["--move", str(move.move_id)] if command == "rollback" else []))
        moved = (step, command) == (Step.CUT_OVER, "resume")
        assert (await slots.moves())[-1].step is (Step.DONE if moved else Step.ROLLED_BACK)
        assert (await slots.topology()).owner(_RANGE[0]).shard_id == (target if moved else source)


async def test_a_rollback_that_comes_too_late_says_so(slots: Slots) -> None:
    _, target = await there_and_back(slots)
    await finished(slots, "move", "--first", str(_RANGE[0]), "--last", str(_RANGE[1]), "--to", target)
    move = (await slots.moves())[-1]
    async with slots.mover("rollback", "--move", str(move.move_id)) as mover:
        (event,) = [event async for event in mover.events()]
    assert event["event"] == "failed"
    assert "way back is closed" in event["why"]
