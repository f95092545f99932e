"""The end of a move whose target is lost for good: the source keeps the slots, and nothing of the move is left there.

Everything else waits for a target that is away, as it may have rows of slots that are not its own, and a slot that
keeps its log. That it never comes back only an operator can say.
"""

from collections.abc import Sequence

from common.moves import TARGET_LOST, Move, Step
from shard.moving.changed import ChangeLog
from shard.moving.moving import MoveError
from shard.moving.side import Side
from shard.moving.streams import idle_sync_slots, name_of, unpublish, unsubscribe


def require_possible(move: Move, moves: Sequence[Move]) -> None:
    """Raises MoveError unless the slots are the source's, and nothing that is idle there can be another move's."""
    if not (move.step.is_before_cutover or move.step is Step.ROLLING_BACK):
        raise MoveError(f"move {move.move_id} is {move.step}: the slots are {move.target}'s, and were lost with it")
    for other in moves:
        copies = other.step is Step.COPYING and other.source == move.source
        if copies and other.target != move.target:
            raise MoveError(
                f"move {other.move_id} is copying from {move.source} too, and its replication slots cannot be told "
                f"from those of move {move.move_id}; let it go on first, or roll it back"
            )


async def give_up(source: Side, move: Move) -> None:
    """Removes from the source all that was made for the move. Raises StreamError, CONNECT_ERRORS."""
    forward = name_of(move.move_id, "forward")
    await ChangeLog(source, forward).remove()
    await unsubscribe(source, name_of(move.move_id, "reverse"))
    await unpublish(source, forward, *await idle_sync_slots(source))


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
