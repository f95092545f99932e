"""The end of a fence that led to nothing: the giver takes writes again, and the taker answers no reads.

The giver does not depend on the taker for that, which may hang or be gone: no router asks a target for slots that the
catalog never gave it. That the giver takes writes is confirmed by it before the catalog forgets when it was fenced, so
that whoever comes next, or looks after fences, knows of each one that there may be.
"""

import asyncio
from dataclasses import replace

from common import catalog_moves
from common.moves import Move
from common.postgres import CONNECT_ERRORS, Connection
from shard.moving import ownership
from shard.moving.moving import Moving
from shard.moving.ownership import OwnershipError
from shard.moving.side import Side
from shard.moving.streams import Stream

_CATALOG_TIMEOUT_S = 2.0
# Each is one commit.
_GIVER_TIMEOUT_S = 5.0
_TAKER_TIMEOUT_S = 2.0


async def unfence(moving: Moving, stream: Stream, *, is_known: bool = True) -> None:
    """Has the publisher of a stream take writes again, and its subscriber answer no reads. That nothing is handed over
    is to be recorded before; without `is_known` the catalog is out of reach, and left alone.

    Raises CONNECT_ERRORS, OwnershipError: of the subscriber only after the publisher takes writes.
    """
    # A router that has not heard of the cutover may still ask the source, and must not be answered by it while the
    # target is written.
    is_first = stream.way == "reverse"
    failure = await _close(stream.subscriber, moving.move) if is_first else None
    await let_write(stream.publisher, moving.move)
    if is_known:
        moving.move = await record(moving.catalog, moving.move)
    if not is_first:
        failure = await _close(stream.subscriber, moving.move)
    if failure is not None:
        raise failure


async def let_write(giver: Side, move: Move) -> None:
    """Has the giver take writes again. Raises CONNECT_ERRORS: whether it does is not known."""
    async with asyncio.timeout(_GIVER_TIMEOUT_S):
        await ownership.unfence(giver, move.first, move.last)


async def record(catalog: Connection, move: Move) -> Move:
    """Records that the giver takes writes; the move. Raises CONNECT_ERRORS, MoveConflictError."""
    if move.fenced_at is None:
        return move
    async with asyncio.timeout(_CATALOG_TIMEOUT_S):
        return await catalog_moves.change_move(catalog, move, replace(move, fenced_at=None))


async def close(taker: Side, move: Move) -> None:
    """Has the taker answer no reads. Raises CONNECT_ERRORS, OwnershipError."""
    async with asyncio.timeout(_TAKER_TIMEOUT_S):
        await ownership.close_to_reads(taker, move.first, move.last)


async def _close(taker: Side, move: Move) -> Exception | None:
    try:
        await close(taker, move)
    except (OwnershipError, *CONNECT_ERRORS) as error:
        return error
    return None
