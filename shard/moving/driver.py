"""Driving one move from whatever step the catalog records, with its lease, until it is over or may wait.

What goes away meanwhile, the catalog or a shard's primary, is looked for again; a failover of either side, or the loss
of a replication slot, begins the move anew when nothing is decided yet, and closes the way back when it is.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace

from common import catalog_moves, logs, postgres
from common.config import ConfigError, MoverSettings
from common.moves import TARGET_LOST, UNFENCED, Move, Step
from common.postgres import CONNECT_ERRORS, NOTICE_LOSS, Connection, DatabaseUnreachableError, explain
from shard.moving import cutover, lost_target, side
from shard.moving.moving import MoveError, Moving, Tell, Turn, event_of
from shard.moving.ownership import OwnershipError
from shard.moving.pacing import Pace
from shard.moving.side import Side, SideError, UnreachableError
from shard.moving.steps import STEPS
from shard.moving.streams import SlotLostError, StreamError
from shard.moving.unfence import close, let_write, record, unfence

_log = logs.get_logger("move")

# How long a database may be away, or keep failing, before a move is left to be resumed.
_PATIENCE_S = 60.0
_BACKOFF_S = 0.5
# Another mover's session, which may be ending.
_LEASE_TIMEOUT_S = 15.0
_POLL_S = 0.1
# The side that is not needed for a fence to be taken away, if it would be as well to have it.
_OTHER_TIMEOUT_S = 5.0
# Decided, and not over: whoever has come this far goes on, told to stop or not.
_HANDING_OVER = (Step.CUT_OVER, Step.RETURNED)
# They begin what keeps servers busy, and while they wait no slot is fenced.
_CAN_WAIT = (Step.COPYING, Step.REVERSING, Step.CLEANING)
_LOST = (DatabaseUnreachableError, SideError, *CONNECT_ERRORS)


class LeasedError(MoveError):
    """Another mover drives the move."""


class Driver:
    """Drives one move. `stop` makes it end where it can be resumed, as soon as no slot is fenced. Who has the lock
    `turns` hands over; `pace` says when the others go on.
    """

    def __init__(
        self, settings: MoverSettings, move_id: int, tell: Tell, stop: asyncio.Event, turns: asyncio.Lock, pace: Pace
    ) -> None:
        self._settings = settings
        self._turn = Turn(turns)
        self._pace = pace
        self._move_id = move_id
        self._tell = tell
        self._stop = stop

    async def run(self, *, hold: bool = False, bring_back: bool = False, unfence: bool = False) -> Move:
        """Until the move is over, or with `hold` as soon as it may wait to be cleaned up. With `bring_back` the source
        is to have the slots in the end; with `unfence` it goes only so far that somebody takes writes.

        Raises MoveError, StreamError, OwnershipError: it is left to be resumed, and says why in the catalog. And
        LeasedError.
        """
        tried_since, seen = time.monotonic(), Step.DONE
        while True:
            try:
                try:
                    return await self._run_connected(hold=hold, bring_back=bring_back, unfence=unfence)
                finally:
                    self._turn.end()
            except catalog_moves.MoveConflictError as error:
                # A change whose answer was lost: what the catalog says now is true.
                failure: Exception = error
            except (SlotLostError, *_LOST) as error:
                failure = error
            except LeasedError as error:
                # Of one that was ours a moment ago, a session of ours has not ended yet, or somebody ends a fence.
                if not self._at.move_id:
                    raise
                failure = error
            except (MoveError, StreamError, OwnershipError) as error:
                await self._note(str(error))
                raise
            if unfence and self._at.move_id and not self._at.may_be_fenced:
                # What is left to be done can wait until both sides are there.
                return self._at
            now = time.monotonic()
            # Not by its version, which each attempt raises that gets as far as to record something.
            if self._at.step is not seen:
                tried_since, seen = now, self._at.step
            if self._stop.is_set() or now - tried_since >= _PATIENCE_S:
                await self._note(str(failure))
                if isinstance(failure, LeasedError):
                    raise failure
                raise MoveError(f"move {self._move_id} can be resumed: {failure}") from failure
            _log.warning("a move is interrupted", move_id=self._move_id, error=type(failure).__name__)
            await asyncio.sleep(_BACKOFF_S)

    async def give_up_target(self) -> Move:
        """Rolls a move back whose slots the source has, and with the source alone: what the target had is left where
        it is. Raises MoveError: it has gone over, or the target answers after all, or the source does not; and
        StreamError, LeasedError, CatalogError.
        """
        try:
            async with leased(self._settings, self._move_id, from_hung=True) as (connection, found):
                if found.step is Step.ROLLED_BACK:
                    return found
                lost_target.require_possible(found)
                move = await self._unfence_alone(connection, found)
                await self._require_lost(move)
                move = await self._rolling_back(connection, move)
                async with self._side(move, move.source) as source:
                    await lost_target.give_up(source, move)
                ended = replace(move, step=Step.ROLLED_BACK, error=TARGET_LOST, fenced_at=None)
                move = await catalog_moves.change_move(connection, move, ended)
        except _LOST as error:
            raise MoveError(f"move {self._move_id} cannot be given up now: {explain(error)}") from error
        self._tell(event_of(move))
        return move

    async def _require_lost(self, move: Move) -> None:
        """Raises MoveError when the target answers, whatever it says."""
        refused = MoveError(f"{move.target} can be reached; roll move {move.move_id} back together with it")
        try:
            async with self._side(move, move.target):
                raise refused
        except (UnreachableError, ConfigError):
            # Or it is not even known any more where it was.
            return
        except _LOST as error:
            raise refused from error

    async def look(self) -> None:
        """Records of a move that waits for the end of its rollback window that it is closed, if something has seen to
        that. What cannot be found out now is left to the next look.
        """
        with suppress(LeasedError, catalog_moves.MoveConflictError, *_LOST):
            async with leased(self._settings, self._move_id) as (connection, move):
                if move.step is not Step.ACTIVE:
                    return
                async with self._side(move, move.source) as source, self._side(move, move.target) as target:
                    await cutover.note_way_back(self._moving(connection, move, source, target))

    _at = Move(0, 0, 0, "", "", Step.PLANNED)

    async def _run_connected(self, *, hold: bool, bring_back: bool, unfence: bool) -> Move:
        async with leased(self._settings, self._move_id, from_hung=unfence) as (connection, found):
            self._at = move = await self._rolling_back(connection, found) if bring_back else found
            self._at = move = await self._unfence_alone(connection, move)
            if move.step.is_final:
                return move
            async with (
                self._side(move, move.source) as source,
                self._side(move, move.target) as target,
            ):
                moving = self._moving(connection, move, source, target)
                moving.told()
                await cutover.note_way_back(moving)
                if bring_back:
                    await self._turn_round(moving)
                await self._begin_anew(moving)
                self._at = moving.move
                if unfence:
                    return await self._unfence(moving)
                for stream in (moving.forward, moving.reverse):
                    await stream.reconnect()
                while not (moving.move.step.is_final or (hold and moving.move.step is Step.ACTIVE)):
                    if bring_back and moving.move.step is Step.ACTIVE:
                        await moving.advance(Step.RETURNING)
                    if not await self._step(moving):
                        break
                    if moving.move.step not in _HANDING_OVER:
                        self._turn.end()
                    self._at = moving.move
                return moving.move

    async def _rolling_back(self, connection: Connection, move: Move) -> Move:
        """Has it be undone, if it has not gone over: from then on it cannot."""
        if not move.step.is_before_cutover:
            return move
        rolling_back = replace(move, step=Step.ROLLING_BACK, error="rolled back by request")
        return await catalog_moves.change_move(connection, move, rolling_back)

    async def _step(self, moving: Moving) -> bool:
        """Takes one step; False when told to stop. What is fenced by then is not left so."""
        if self._stop.is_set() and moving.move.step not in _HANDING_OVER:
            return False
        work = asyncio.ensure_future(self._work(moving))
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
            decided = moving.fenced_at is not None or moving.move.step in _HANDING_OVER
            if work.done() or decided:
                await work
                return True
            return False
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _work(self, moving: Moving) -> None:
        step = moving.move.step
        if step in _CAN_WAIT:
            if step is Step.COPYING:
                await self._pace.turn()
            await self._pace.room(moving.source, moving.target)
            await self._turn.others()
        await STEPS[step](moving)
        if step is Step.COPYING:
            self._pace.copied(moving.copied)

    async def _unfence_alone(self, connection: Connection, move: Move) -> Move:
        """Takes away the fence of a process that is gone, or has lost its sessions, with that shard alone which is to
        take writes again: the other may be gone, too.
        """
        if not move.may_be_fenced or move.step in _HANDING_OVER:
            return move
        if move.step is Step.FENCED:
            ended = replace(move, step=Step.VERIFYING, attempts=move.attempts + 1, error=UNFENCED)
            move = await catalog_moves.change_move(connection, move, ended)
            self._at = move
        giver = move.source
        if move.step is Step.RETURNING:
            giver = move.target
            # As in `unfence`: before the target is written again, if it can be.
            with suppress(*_LOST):
                async with asyncio.timeout(_OTHER_TIMEOUT_S), self._side(move, move.source) as source:
                    await close(source, move)
        async with self._side(move, giver) as side:
            await let_write(side, move)
        return await record(connection, move)

    def _moving(self, connection: Connection, move: Move, source: Side, target: Side) -> Moving:
        return Moving(connection, self._settings, move, source, target, self._tell, self._turn, self._pace)

    def _side(self, move: Move, shard_id: str) -> AbstractAsyncContextManager[Side]:
        settings = self._settings
        return side.opened(shard_id, settings.shard_dsn(shard_id), move.move_id, hung_after_s=settings.hung_after_s)

    async def _unfence(self, moving: Moving) -> Move:
        """What `_unfence_alone` leaves: the other side, and what is decided."""
        step = moving.move.step
        if step in _HANDING_OVER:
            await STEPS[step](moving)
        elif step is Step.RETURNING:
            await unfence(moving, moving.reverse)
        elif step.is_before_cutover or step is Step.ROLLING_BACK:
            await unfence(moving, moving.forward)
        return moving.move

    async def _turn_round(self, moving: Moving) -> None:
        """Has a move go back that has gone over. Raises MoveError when it is too late."""
        step = moving.move.step
        if step is Step.ACTIVE:
            if why := await cutover.way_back_closed_by(moving):
                raise MoveError(why)
            await moving.advance(Step.RETURNING)
        elif step in (Step.CLEANING, Step.DONE):
            raise MoveError("the way back is closed: the source's rows are being removed")

    async def _begin_anew(self, moving: Moving) -> None:
        """Has a move begin again that nothing is decided of, and that can come to nothing as it is."""
        move = moving.move
        if not move.step.is_before_cutover or move.step is Step.PLANNED:
            return
        if cutover.has_failed_over(moving):
            why = "begun again after a failover"
        elif lost := [stream.name for stream in (moving.forward, moving.reverse) if await stream.is_cut()]:
            why = f"begun again, as the replication slot {lost[0]} was gone or invalidated"
        else:
            return
        await moving.advance(Step.PLANNED, attempts=move.attempts + 1, error=why)

    async def _note(self, why: str) -> None:
        """Says in the catalog why the move stopped, if that can be said."""
        try:
            async with leased(self._settings, self._move_id) as (connection, move):
                if not move.step.is_final:
                    await catalog_moves.change_move(connection, move, replace(move, error=why[:500]))
        except (LeasedError, catalog_moves.MoveConflictError, *_LOST) as error:
            _log.warning("the catalog does not know why a move stopped", error=type(error).__name__)


@asynccontextmanager
async def leased(
    settings: MoverSettings, move_id: int, *, from_hung: bool = False
) -> AsyncIterator[tuple[Connection, Move]]:
    """A connection to the catalog that has the lease of a move, and the move. With `from_hung` it is taken from a mover
    that has fenced the slots and does nothing any more: its session is ended, and with it the right to change anything.

    Raises LeasedError, DatabaseUnreachableError, CatalogError.
    """
    dsn = settings.catalog_dsn.get_secret_value()
    connection = await postgres.connect(dsn, what="the catalog", settings=NOTICE_LOSS)
    try:
        deadline = time.monotonic() + _LEASE_TIMEOUT_S + (settings.hung_after_s if from_hung else 0)
        while not await catalog_moves.take_lease(connection, move_id):
            if time.monotonic() >= deadline:
                raise LeasedError(f"another mover drives move {move_id}")
            if from_hung and (await catalog_moves.read_move(connection, move_id)).fenced_at is not None:
                await catalog_moves.end_hung(connection, move_id, settings.hung_after_s)
            await asyncio.sleep(_POLL_S)
        yield connection, await catalog_moves.read_move(connection, move_id)
    finally:
        connection.terminate()
