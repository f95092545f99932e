"""The hand-over of a range: from the moment that nobody may write to it to the moment that its new owner lets them.

The way back (`returning`) is the same with the two sides exchanged.
"""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime

from common import catalog, catalog_moves, logs
from common.catalog import CatalogError
from common.catalog_moves import MoveConflictError
from common.moves import UNFENCED, WAY_BACK_CLOSED, WAY_BACK_LOST, WAYS_BACK_CLOSED, Step
from common.postgres import CONNECT_ERRORS
from shard.moving import ownership
from shard.moving.copying import compared, settle
from shard.moving.moving import MoveError, Moving
from shard.moving.ownership import Departure, FenceError
from shard.moving.side import Side, SideError
from shard.moving.streams import Stream, StreamError
from shard.moving.unfence import unfence
from shard.moving.verify import count, merged
from shard.position import Position

_log = logs.get_logger("cutover")

# Attempts to fence after which somebody has to look.
MAX_ATTEMPTS = 8
_PAUSE_S = 0.5
_CATALOG_TIMEOUT_S = 2.0
# A look takes as long as the first half of what is done under the fence. One that takes longer than this means that the
# servers are busy, with a copy that begins or whatever it is, and the fence can wait for a better moment: so long.
_CALM_S = 0.1
_CALM_TIMEOUT_S = 3.0
_CALM_POLL_S = 0.05

_FAILURES = (FenceError, StreamError, SideError, MoveError, CatalogError, *CONNECT_ERRORS)


async def fence(moving: Moving) -> None:
    """Stops the writes, brings the rest over, compares it, and has the catalog name the target.

    What takes too long is given up, and tried again: a compare-and-set first, so that it is not done after all, and
    then the source takes writes again (`copying.verify`).
    """
    if moving.comparison is None:
        # The process that fenced is gone. Its fence may be old.
        await moving.advance(Step.VERIFYING, attempts=moving.move.attempts + 1, error=UNFENCED)
        return
    # Without it there would be no way back from the moment that the slots go over.
    await moving.reverse.require_slot()
    await _handed_over(moving, moving.forward, Step.CUT_OVER, or_else=Step.VERIFYING)


async def activate(moving: Moving) -> None:
    """Tells both shards what the catalog says, and turns the streams round."""
    pause_s = await _told_shards(moving, moving.source, moving.target)
    await moving.changes(moving.forward).remove()
    await moving.forward.remove()
    why = await way_back_closed_by(moving)
    if not why:
        await moving.reverse.enable()
    moving.comparison = moving.fenced_at = None
    await (_close_way_back(moving, why) if why else moving.advance(Step.ACTIVE, fenced_at=None))
    if pause_s:
        moving.told(pause_ms=round(pause_s * 1000, 1))


def has_failed_over(moving: Moving) -> bool:
    """Whether either side has failed over since the move began: a slot, or what a subscriber had taken without waiting
    for its standbys, may be lost with the old primary.
    """
    move = moving.move
    return (move.source_timeline, move.target_timeline) != (moving.source.timeline, moving.target.timeline)


async def way_back_closed_by(moving: Moving) -> str:
    """Why what is written to the target does not go back to the source any more; empty while it does."""
    if has_failed_over(moving):
        return WAY_BACK_CLOSED
    return "" if await moving.reverse.has_slot() else WAY_BACK_LOST


async def note_way_back(moving: Moving) -> None:
    """Records of a move that could still be brought back that it cannot, when something has seen to that."""
    move = moving.move
    is_open = move.step is Step.ACTIVE and move.error not in WAYS_BACK_CLOSED
    if is_open and (why := await way_back_closed_by(moving)):
        await _close_way_back(moving, why)


async def bring_back(moving: Moving) -> None:
    """Returns the slots to the source, with all that was written to the target since."""
    reverse = moving.reverse
    # Whatever an earlier attempt has fenced. A compare-and-set first: nobody else is at it.
    await moving.advance(Step.RETURNING)
    await unfence(moving, reverse)
    if why := await way_back_closed_by(moving):
        await _close_way_back(moving, why)
        raise MoveError(why)
    await compared(moving, reverse)
    await _handed_over(moving, reverse, Step.RETURNED, or_else=Step.RETURNING)


async def settle_return(moving: Moving) -> None:
    """Tells both shards that the source has the slots again."""
    pause_s = await _told_shards(moving, moving.target, moving.source)
    await moving.changes(moving.reverse).remove()
    await moving.advance(Step.ROLLING_BACK, fenced_at=None)
    if pause_s:
        moving.told(pause_ms=round(pause_s * 1000, 1))


async def _close_way_back(moving: Moving, why: str) -> None:
    await moving.advance(Step.ACTIVE, fenced_at=None, error=why, rollback_window_s=0.0)


async def _handed_over(moving: Moving, stream: Stream, step: Step, *, or_else: Step) -> None:
    """From the publisher of a stream to its subscriber, which is `step`; what takes too long is given up: `or_else`."""
    await _made_ready(moving, stream)
    deadline = time.monotonic() + moving.settings.fence_timeout_s
    try:
        async with asyncio.timeout(moving.settings.fence_timeout_s):
            position = await _brought_over(moving, stream)
        # By itself: once it is asked for, no deadline may cut it short.
        await moving.hand_over(step, stream.publisher, stream.subscriber, position, deadline)
        moving.lap("recorded")
    except MoveConflictError:
        raise
    except _FAILURES as error:
        why = str(error) or f"it took longer than {moving.settings.fence_timeout_s:g} s"
        await _given_up(moving, or_else, why)


async def _made_ready(moving: Moving, stream: Stream) -> None:
    """Waits for this move's turn and for a calm moment, and does before the fence what can be done before it."""
    assert moving.comparison is not None
    await stream.require_slot()
    await moving.turn.take()
    await moving.rehearse(stream.publisher, stream.subscriber)
    deadline = time.monotonic() + _CALM_TIMEOUT_S
    while True:
        looked_s = await settle(moving, stream, moving.comparison)
        if looked_s <= _CALM_S or time.monotonic() >= deadline:
            return
        await asyncio.sleep(_CALM_POLL_S)


async def _brought_over(moving: Moving, stream: Stream) -> Position:
    """From the fence to the commit on the taker; the place in its log at which it has everything."""
    move, comparison = moving.move, moving.comparison
    giver, taker = stream.publisher, stream.subscriber
    assert comparison is not None
    moving.may_be_decided = False
    moving.move = await catalog_moves.change_move(
        moving.catalog, move, replace(move, fenced_at=datetime.now(UTC), attempts=move.attempts)
    )
    moving.fenced_at = time.monotonic()
    moving.laps.clear()
    fenced = await ownership.fence(
        giver,
        move.first,
        move.last,
        timeout_s=moving.settings.fence_timeout_s / 2,
        move_id=move.move_id,
        way=stream.way,
        mark=time.time_ns(),
    )
    moving.fenced_at = fenced.since
    moving.lap("fenced")
    # Meanwhile the taker gets the last rows.
    changed = await comparison.changes.take()
    moving.lap("read")
    await stream.arrived(fenced.mark, moving.settings.fence_timeout_s)
    moving.lap("arrived")
    different = await comparison.verifier.some(merged(comparison.suspects, changed))
    moving.lap("compared")
    if different:
        tables = ", ".join(sorted(different))
        raise MoveError(f"{count(different)} rows differ between {giver.shard_id} and {taker.shard_id} ({tables})")
    position = await ownership.open_to_reads(taker, move.first, move.last)
    moving.lap("committed")
    return position


async def _given_up(moving: Moving, step: Step, why: str) -> None:
    """The end of a fence that led to nothing: recorded first, then taken away, whatever has become of the other side.

    With the catalog out of reach it is taken away all the same, unless the catalog was asked to hand the slots over.
    """
    stream = moving.forward if step is Step.VERIFYING else moving.reverse
    try:
        async with asyncio.timeout(_CATALOG_TIMEOUT_S):
            await moving.advance(step, attempts=moving.move.attempts + 1, error=why)
    except CONNECT_ERRORS:
        # Nobody else can have handed over what is fenced here: for that the lock is needed which this session holds.
        if not moving.may_be_decided:
            await unfence(moving, stream, is_known=False)
        raise
    await unfence(moving, stream)
    moving.told(pause_ms=round(moving.since_fence_s() * 1000, 1))
    moving.comparison = moving.fenced_at = None
    if moving.move.attempts > MAX_ATTEMPTS:
        raise MoveError(f"given up after {MAX_ATTEMPTS} attempts: {why}")
    await asyncio.sleep(_PAUSE_S)


async def _told_shards(moving: Moving, giver: Side, taker: Side) -> float:
    """Has the giver send callers away, and then the taker take writes; seconds since the fence, 0 when that is unknown.

    Reads are answered all the while: by the giver at first, from then on by the taker, which has been open to them.
    """
    move = moving.move
    departure = moving.departure or await _departure(moving, giver, taker)
    await ownership.give_up(giver, move.first, move.last, departure)
    moving.lap("given up")
    await ownership.take(taker, move.first, move.last, move.cutover_epoch)
    moving.lap("taken")
    if moving.fenced_at is not None:
        _log.info("handed over", move_id=move.move_id, after_ms=moving.laps)
    return moving.since_fence_s()


async def _departure(moving: Moving, giver: Side, taker: Side) -> Departure:
    """What callers are to be told, from the catalog: by one who has not handed over, and goes on for another."""
    topology = await catalog.read_topology(moving.catalog)
    address = next(shard.address for shard in topology.shards if shard.shard_id == taker.shard_id)
    cutover = next(c for c in topology.cutovers if (c.source, c.target) == (giver.shard_id, taker.shard_id))
    here = Position(cutover.timeline, cutover.lsn, waits=False, server="")
    return Departure(taker.shard_id, address, moving.move.cutover_epoch, here)
