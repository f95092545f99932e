"""The end of a move whose target is lost for good: the source keeps the slots, and nothing of the move is left there.

Everything else waits for a target that is away, as it may have rows of slots that are not its own, and a slot that
keeps its log. That it never comes back only an operator can say.
"""

from collections.abc import Sequence

from common.moves import TARGET_LOST, Move, Step
from shard.moving import ownership
from shard.moving.changed import ChangeLog
from shard.moving.moving import MoveError
from shard.moving.side import Side
from shard.moving.streams import name_of, sync_slots, unpublish, unsubscribe


def require_possible(move: Move) -> None:
    """Raises MoveError unless the source has the slots, as far as the catalog is concerned."""
    if not (move.step.is_before_cutover or move.step in (Step.RETURNED, Step.ROLLING_BACK)):
        raise MoveError(f"move {move.move_id} is {move.step}: the slots are {move.target}'s")


async def give_up(source: Side, move: Move) -> None:
    """Removes from the source all that was made for the move. Raises StreamError, CONNECT_ERRORS."""
    forward = name_of(move.move_id, "forward")
    if move.step is Step.RETURNED:
        # Nobody answers for them any more who could have been asked before the source was told.
        await ownership.take(source, move.first, move.last, move.cutover_epoch)
    await ChangeLog(source, forward).remove()
    await unsubscribe(source, name_of(move.move_id, "reverse"))
    await unpublish(source, forward, *await sync_slots(source, forward))


async def tidy(target: Side, moves: Sequence[Move]) -> None:
    """Removes the streams of moves that were given up with this target from it, now that it is back, as from a backup.
    The rows are removed by the move that brings their slots here again.
    """
    for move in moves:
        if (move.step, move.error, move.target) == (Step.ROLLED_BACK, TARGET_LOST, target.shard_id):
            reverse = name_of(move.move_id, "reverse")
            await unsubscribe(target, name_of(move.move_id, "forward"))
            await ChangeLog(target, reverse).remove()
            await unpublish(target, reverse)
