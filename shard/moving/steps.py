"""The steps of a move and what is done in each: every step of common/moves.py that is not final has one function.

Each begins from what the catalog records and may find itself half done: whoever comes after a mover that died runs it
again.
"""

from collections.abc import Awaitable, Callable, Mapping

from common.moves import WAYS_BACK_CLOSED, Step
from shard.moving import copying, cutover, ownership
from shard.moving.cleanup import remove_rows
from shard.moving.moving import Moving


async def clean(moving: Moving) -> None:
    """Closes the way back, and removes the rows that the source has no use for any more: not one of them before the
    target says that it has every slot.
    """
    move = moving.move
    await ownership.check_owner(moving.target, move.first, move.last)
    for stream in (moving.forward, moving.reverse):
        await moving.changes(stream).remove()
        await stream.remove()
    between = moving.pace.between(moving.source, moving.target)
    removed = await remove_rows(moving.source, move.first, move.last, moving.forward, moving.reverse, between=between)
    await ownership.forget_departures(moving.source)
    moving.told(removed=removed)
    await moving.advance(Step.DONE, error=_for_good(moving))


async def roll_back(moving: Moving) -> None:
    """Removes all that was made for the move."""
    await copying.undo(moving)
    await moving.advance(Step.ROLLED_BACK)


async def wait(moving: Moving) -> None:
    """The target serves. When it is time, the driver goes on to clean up."""
    await moving.advance(Step.CLEANING, error=_for_good(moving))


def _for_good(moving: Moving) -> str:
    """What there is to say of the move whatever becomes of it."""
    return moving.move.error if moving.move.error in WAYS_BACK_CLOSED else ""


STEPS: Mapping[Step, Callable[[Moving], Awaitable[None]]] = {
    Step.PLANNED: copying.plan,
    Step.COPYING: copying.copy,
    Step.VERIFYING: copying.verify,
    Step.REVERSING: copying.reverse,
    Step.FENCED: cutover.fence,
    Step.CUT_OVER: cutover.activate,
    Step.ACTIVE: wait,
    Step.CLEANING: clean,
    Step.RETURNING: cutover.bring_back,
    Step.RETURNED: cutover.settle_return,
    Step.ROLLING_BACK: roll_back,
}
