"""Copying a range and comparing it while it is written: the steps in which nothing is decided yet."""

import asyncio
import time

from common import catalog_moves
from common.moves import Step
from shard.large_users import indexes
from shard.moving.cleanup import remove_rows
from shard.moving.lost_target import tidy
from shard.moving.moving import Comparison, MoveError, Moving
from shard.moving.streams import Stream, StreamError
from shard.moving.tables import MOVED
from shard.moving.unfence import unfence
from shard.moving.verify import Verifier, count, merged

_POLL_S = 0.1
_TELL_INTERVAL_S = 0.5
# The target's service may be at work on an index of its own.
_INDEX_PATIENCE_S = 600.0
# A copy that fails is begun again by PostgreSQL, for ever.
_MAX_ERRORS = 5
# What the taker may be behind, before it is compared with the giver.
_CATCH_UP_TIMEOUT_S = 600.0
# Writes are stopped when this little is left to be compared, and the taker this close.
_FEW_SUSPECTS = 500
_CLOSE_S = 0.5
_ROUNDS = 50

_COUNT = "SELECT count(*) FROM {table} WHERE slot >= $1 AND slot <= $2"


async def plan(moving: Moving) -> None:
    """Makes sure that nothing is left of earlier attempts, and notes which servers this one is with."""
    await undo(moving)
    await tidy(moving.target, await catalog_moves.read_moves(moving.catalog))
    await moving.advance(Step.COPYING, source_timeline=moving.source.timeline, target_timeline=moving.target.timeline)


async def undo(moving: Moving) -> None:
    """Takes back whatever was done before the cutover: the source has the slots, and the target nothing of them.

    Raises OwnershipError when the slots are the target's own: nothing of it is touched then.
    """
    move = moving.move
    await unfence(moving, moving.forward)
    moving.comparison = moving.fenced_at = None
    for stream in (moving.forward, moving.reverse):
        await moving.changes(stream).remove()
        await stream.remove()
    between = moving.pace.between(moving.source, moving.target)
    await remove_rows(moving.target, move.first, move.last, moving.forward, moving.reverse, between=between)


async def copy(moving: Moving) -> None:
    """Copies all rows, and has the target follow the source from then on."""
    forward = moving.forward
    if not await forward.is_subscribed():
        await forward.publish()
        await forward.make_slot()
        await forward.subscribe(enabled=True, copy=True)
    total = await _count(moving)
    began, told_at = time.monotonic(), float("-inf")
    while True:
        tables = await forward.tables()
        copied = sum(total.get(name, 0) if state in "rsf" else rows for name, (state, rows) in tables.items())
        done = bool(tables) and all(state == "r" for state, _ in tables.values())
        if done or time.monotonic() - told_at >= _TELL_INTERVAL_S:
            told_at = time.monotonic()
            elapsed_s = max(told_at - began, 0.001)
            moving.told(rows=copied, total=sum(total.values()), rate=round(copied / elapsed_s))
        if done:
            break
        await forward.require_slot()
        if await forward.errors() >= _MAX_ERRORS:
            raise StreamError(f"the copy fails again and again; the log of {moving.target.shard_id}'s server says why")
        await asyncio.sleep(_POLL_S)
    moving.copied = sum(total.values())
    # Large users' indexes are there before the users are; what comes meanwhile is replicated all the same.
    source, target, move = moving.source, moving.target, moving.move
    made = await indexes.follow(
        source.connection,
        target.connection,
        target.identity,
        move.first,
        move.last,
        memory_mb=moving.settings.own_index_build_mb,
        patience_s=_INDEX_PATIENCE_S,
    )
    if made:
        moving.told(indexes=made)
    await moving.advance(Step.VERIFYING)


async def verify(moving: Moving) -> None:
    """Compares everything, until what is left to be looked at again is little."""
    # What an attempt to fence has left, if this is not the first: its end is recorded by now.
    await unfence(moving, moving.forward)
    moving.fenced_at = None
    comparison = await compared(moving, moving.forward)
    await moving.advance(Step.REVERSING, rows=comparison.verifier.rows)


async def reverse(moving: Moving) -> None:
    """Makes the way back. Before the fence, since the slot waits for whatever transaction is open on the target."""
    if moving.comparison is None:
        # Whoever compared is gone, and with it what has to be looked at again.
        await moving.advance(Step.VERIFYING)
        return
    way = moving.reverse
    await way.publish()
    await way.make_slot()
    await way.subscribe(enabled=False, copy=False)
    await settle(moving, moving.forward, moving.comparison)
    await moving.advance(Step.FENCED)


async def compared(moving: Moving, stream: Stream) -> Comparison:
    """Compares what the two sides of a stream have, and keeps what has to be looked at again."""
    move = moving.move
    changes = moving.changes(stream)
    await changes.make()
    comparison = Comparison(Verifier(stream.publisher, stream.subscriber, move.first, move.last), changes)
    await stream.caught_up(_CATCH_UP_TIMEOUT_S)
    comparison.suspects = await comparison.verifier.all(moving.pace.between(stream.publisher, stream.subscriber))
    await settle(moving, stream, comparison)
    moving.comparison = comparison
    return comparison


async def settle(moving: Moving, stream: Stream, comparison: Comparison) -> float:
    """Looks again at what differed or has changed since, until that is little and the subscriber is close; the seconds
    that the last look took.
    """
    for _ in range(_ROUNDS):
        looked = time.monotonic()
        await comparison.changes.shorten()
        # The commit of the mark takes the snapshot to the disk too, so that this `take` has it, and the next one begins
        # there: what is decoded under the fence is what came since.
        mark = await stream.mark()
        changed = await comparison.changes.take()
        # As under the fence, the subscriber has the time of the `take` to come closer.
        began = time.monotonic()
        await stream.arrived(mark, _CATCH_UP_TIMEOUT_S)
        lag_s = time.monotonic() - began
        comparison.suspects = await comparison.verifier.some(merged(comparison.suspects, changed))
        moving.told(rows=comparison.verifier.rows, lag_ms=round(lag_s * 1000), suspects=count(comparison.suspects))
        if lag_s <= _CLOSE_S and count(changed) + count(comparison.suspects) <= _FEW_SUSPECTS:
            return time.monotonic() - looked
    raise MoveError(
        f"{stream.subscriber.shard_id} does not keep up with what is written to {stream.publisher.shard_id}"
    )


async def _count(moving: Moving) -> dict[str, int]:
    """How many rows each table has that are to be copied."""
    move, connection = moving.move, moving.source.connection
    return {table: await connection.fetchval(_COUNT.format(table=table), move.first, move.last) for table in MOVED}
