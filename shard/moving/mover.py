"""What an operator asks for, made of moves: rebalance, drain, resume, roll back; shards that come and leave."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from common import catalog, catalog_moves, catalog_shards, logs, postgres
from common.catalog import CatalogError, EpochConflictError, PlacementStrategy
from common.catalog_moves import MoveConflictError
from common.config import MoverSettings
from common.moves import Move, Step
from common.postgres import CONNECT_ERRORS, Connection, DatabaseUnreachableError
from common.topology import Shard, ShardStatus, Topology
from shard.moving.driver import Driver, LeasedError, leased
from shard.moving.moving import MoveError, Tell
from shard.moving.ownership import OwnershipError
from shard.moving.pacing import Pace
from shard.moving.plan import PlannedMove, by_hand, plan
from shard.moving.side import SideError
from shard.moving.streams import StreamError

_log = logs.get_logger("mover")

_TRIES = 5
# What a database that is away, or a move that cannot go on, may end with.
_EXPECTED = (
    MoveError,
    StreamError,
    OwnershipError,
    SideError,
    CatalogError,
    DatabaseUnreachableError,
    *CONNECT_ERRORS,
)
# Moves that are not over: each has a replication slot on the target, of which a server has a bounded number.
_MAX_OPEN = 6
# How soon a failover is noticed that closes the rollback window of a move that waits.
_LOOK_INTERVAL_S = 10.0


class Mover:
    """Plans moves and drives them, several at once. `tell` hears of everything that happens."""

    def __init__(self, settings: MoverSettings, tell: Tell) -> None:
        self._settings = settings
        self._tell = tell
        self._stop = asyncio.Event()
        self._turns = asyncio.Lock()
        self._pace = Pace(settings.max_rate, settings.max_standby_lag_bytes, tell)

    def stop(self) -> None:
        """Ends what is under way where it can be resumed."""
        self._stop.set()

    async def planned(self) -> list[PlannedMove]:
        """The moves that would be made now, told as well. Raises PlanError, CatalogError."""
        async with self._catalog() as connection:
            topology = await catalog.read_topology(connection)
            pins = await catalog_moves.read_pins(connection)
        moves = plan(topology, pins=pins, max_slots=self._settings.max_slots)
        told = [
            {"first": move.first, "last": move.last, "source": move.source, "target": move.target} for move in moves
        ]
        self._tell({"event": "plan", "slots": sum(move.slots for move in moves), "moves": told})
        return moves

    async def rebalance(self) -> None:
        """Finishes what is open, then moves slots until each shard has its share. Raises MoveError, CatalogError."""
        await self.resume()
        while not self._stop.is_set() and (moves := await self.planned()):
            await self._run(moves)
        await self._finish()

    async def move(self, first: int, last: int, target: str) -> None:
        """Moves slots `first` to `last`, both included and all of one shard, to `target`. Raises MoveError, PlanError,
        CatalogError.
        """
        async with self._catalog() as connection:
            topology = await catalog.read_topology(connection)
        await self._run(by_hand(topology, first, last, target, max_slots=self._settings.max_slots))
        await self._finish()

    async def drain(self, shard_id: str) -> None:
        """Moves all slots off a shard, which gets no others from now on. Raises MoveError, CatalogError, PlanError."""
        async with self._catalog() as connection:
            # Where nobody could take its slots, its status stays as it is.
            plan(await catalog.read_topology(connection), draining=[shard_id])
            await _set_status(connection, shard_id, ShardStatus.DRAINING)
        await self.rebalance()
        async with self._catalog() as connection:
            left = (await catalog.read_topology(connection)).slot_count(shard_id)
        if left:
            raise MoveError(f"{shard_id} still has {left} slots; the same command again goes on")

    async def add(self, shard: Shard) -> int:
        """Registers a shard without slots, so that its service can start; the epoch. Raises CatalogError."""
        async with self._catalog() as connection:
            for _ in range(_TRIES):
                try:
                    return await catalog_shards.add_shard(connection, await catalog.read_epoch(connection), shard)
                except EpochConflictError:
                    continue
        raise CatalogError("the catalog keeps changing")

    async def set(self, shard_id: str, status: ShardStatus | None, weight: int | None) -> int:
        """Sets a shard's status, its weight, or both; the epoch. Raises CatalogError."""
        async with self._catalog() as connection:
            for _ in range(_TRIES):
                epoch = await catalog.read_epoch(connection)
                try:
                    if status is not None:
                        epoch = await catalog_shards.set_status(connection, epoch, shard_id, status)
                    if weight is not None:
                        epoch = await catalog_shards.set_weight(connection, epoch, shard_id, weight)
                except EpochConflictError:
                    continue
                return epoch
        raise CatalogError("the catalog keeps changing")

    async def remove(self, shard_id: str) -> int:
        """Takes a shard that has no slots out of the catalog; the epoch. Raises CatalogError."""
        async with self._catalog() as connection:
            for _ in range(_TRIES):
                try:
                    return await catalog_shards.remove_shard(connection, await catalog.read_epoch(connection), shard_id)
                except EpochConflictError:
                    continue
        raise CatalogError("the catalog keeps changing")

    async def resume(self, move_id: int | None = None, rollback_window_s: float | None = None) -> None:
        """Brings moves that are open to their end: one, or all that nobody drives. With `rollback_window_s` they can be
        brought back for so long, whatever they were made with. Raises MoveError, CatalogError.
        """
        moves = await self.moves()
        if move_id is not None:
            moves = [move for move in moves if move.move_id == move_id]
            if not moves:
                raise CatalogError(f"there is no move {move_id}")
        moves = [move for move in moves if not move.step.is_final]
        if rollback_window_s is not None:
            await self._set_window([move.move_id for move in moves], rollback_window_s, passing=move_id is None)
        active = [move for move in moves if move.step is Step.ACTIVE]
        await self._drive([move.move_id for move in moves if move.step is not Step.ACTIVE], passing=move_id is None)
        # Those whose time to be brought back is not over wait for it.
        await self._settle([move.move_id for move in active], passing=move_id is None)

    async def recover(self) -> None:
        """Ends the fences of moves that nobody drives, or only a mover that hangs, and no more. Raises MoveError."""

        async def recover(move_id: int) -> None:
            with suppress(LeasedError):
                await self._driver(move_id).run(unfence=True)

        await _together([recover(move.move_id) for move in await self.moves() if move.may_be_fenced])

    async def keep_recovering(self, every_s: float) -> None:
        """Does so until it is told to stop. What keeps it from it, as a catalog that is away, is tried again."""
        while not await self._stopped_within(every_s):
            try:
                async with self._catalog() as connection:
                    moves = [move for move in await catalog_moves.read_moves(connection) if move.may_be_fenced]
                    hung_after_s = self._settings.hung_after_s
                    left = [m for m in moves if await catalog_moves.is_unattended(connection, m, hung_after_s)]
                if left:
                    _log.warning("a mover has left slots that nobody may write to", moves=[m.move_id for m in left])
                    await self.recover()
            except _EXPECTED as error:
                _log.warning("fences could not be looked after", error=type(error).__name__)

    async def roll_back(self, move_id: int, *, target_lost: bool = False) -> Move:
        """Brings the slots of a move back to where they were. With `target_lost` the target is gone for good, and is
        not asked for anything. Raises MoveError when it is too late.
        """
        if target_lost:
            return await self._driver(move_id).give_up_target()
        async with self._catalog() as connection:
            move = await catalog_moves.read_move(connection, move_id)
        if move.step in (Step.CLEANING, Step.DONE):
            raise MoveError(f"move {move_id} is {move.step}: its way back is closed. Move the slots there anew")
        return await self._driver(move_id).run(bring_back=True)

    async def moves(self) -> list[Move]:
        """All moves, oldest first."""
        async with self._catalog() as connection:
            return await catalog_moves.read_moves(connection)

    async def placement(self) -> PlacementStrategy:
        """What decides a memory's slot. Raises CatalogError."""
        async with self._catalog() as connection:
            return (await catalog.read_cluster(connection)).placement

    async def pin(self, slot: int, shard_id: str | None) -> None:
        """Has a slot stay on a shard from the next rebalance on; None: wherever. Raises CatalogError."""
        async with self._catalog() as connection:
            await catalog_moves.pin(connection, slot, shard_id)

    async def _run(self, moves: Sequence[PlannedMove]) -> None:
        """Makes the moves of a plan, each recorded when its turn has come."""
        places, still_open = asyncio.Semaphore(self._settings.concurrency), asyncio.Semaphore(_MAX_OPEN)

        async def move(planned: PlannedMove) -> None:
            async with still_open:
                async with places:
                    while (left_s := self._pace.wait_s()) > 0:
                        if await self._stopped_within(left_s):
                            break
                    if self._stop.is_set():
                        return
                    async with self._catalog() as connection:
                        try:
                            made = await catalog_moves.create_move(
                                connection,
                                planned.first,
                                planned.last,
                                planned.source,
                                planned.target,
                                rollback_window_s=self._settings.rollback_window_s,
                            )
                        except MoveConflictError as error:
                            raise MoveError(str(error)) from error
                    _require_kept(await self._driver(made.move_id).run(hold=True))
                await self._settle([made.move_id])

        await _together([move(planned) for planned in moves])

    async def _finish(self) -> None:
        if self._stop.is_set():
            raise MoveError("stopped; `memshard moves resume` or the same command again goes on")

    async def _drive(self, move_ids: Sequence[int], *, passing: bool = False) -> None:
        """Brings moves to their end, with all the time that they have to be brought back."""
        places = asyncio.Semaphore(self._settings.concurrency)

        async def drive(move_id: int) -> None:
            try:
                async with places:
                    await self._driver(move_id).run(hold=True)
                await self._settle([move_id])
            except LeasedError:
                if not passing:
                    raise

        await _together([drive(move_id) for move_id in move_ids])

    async def _settle(self, move_ids: Sequence[int], *, passing: bool = False) -> None:
        """Cleans up after moves once their time to be brought back is over."""

        async def settle(move_id: int) -> None:
            # By what the catalog has: another process may have made it, or have given it another window meanwhile.
            if (left_s := await self._window_left_s(move_id)) is None:
                return
            while left_s is not None and left_s > 0:
                if await self._stopped_within(min(left_s, _LOOK_INTERVAL_S)):
                    return
                if left_s > _LOOK_INTERVAL_S:
                    await self._driver(move_id).look()
                left_s = await self._window_left_s(move_id)
            if self._stop.is_set():
                return
            try:
                ended = await self._driver(move_id).run()
            except LeasedError:
                if not passing:
                    raise
                return
            _require_kept(ended)

        await _together([settle(move_id) for move_id in move_ids])

    async def _window_left_s(self, move_id: int) -> float | None:
        """Seconds for which a move can still be brought back. None: it does not wait for the end of that."""
        async with self._catalog() as connection:
            move = await catalog_moves.read_move(connection, move_id)
        if move.step is not Step.ACTIVE:
            return None
        if move.rollback_until is None:
            return 0.0
        return (move.rollback_until - datetime.now(UTC)).total_seconds()

    async def _set_window(self, move_ids: Sequence[int], seconds: float, *, passing: bool) -> None:
        """Records another rollback window of moves, with the lease of each."""

        async def change(move_id: int) -> None:
            try:
                async with leased(self._settings, move_id) as (connection, move):
                    if not move.step.is_final:
                        await catalog_moves.change_move(connection, move, replace(move, rollback_window_s=seconds))
            except LeasedError:
                if not passing:
                    raise

        await _together([change(move_id) for move_id in move_ids])

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    def _driver(self, move_id: int) -> Driver:
        return Driver(self._settings, move_id, self._tell, self._stop, self._turns, self._pace)

    @asynccontextmanager
    async def _catalog(self) -> AsyncIterator[Connection]:
        connection = await postgres.connect(self._settings.catalog_dsn.get_secret_value(), what="the catalog")
        try:
            yield connection
        finally:
            connection.terminate()


def _require_kept(ended: Move) -> None:
    """Raises MoveError when somebody has rolled a move back that others made: whoever asked for that does not want its
    slots to be moved at once again.
    """
    if ended.step is Step.ROLLED_BACK:
        raise MoveError(f"move {ended.move_id} was rolled back; `memshard rebalance` would move its slots anew")


async def _set_status(connection: Connection, shard_id: str, status: ShardStatus) -> Topology:
    for _ in range(_TRIES):
        topology = await catalog.read_topology(connection)
        known = {shard.shard_id: shard.status for shard in topology.shards}
        if known.get(shard_id) is status:
            return topology
        try:
            await catalog_shards.set_status(connection, topology.epoch, shard_id, status)
        except EpochConflictError:
            continue
    raise CatalogError("the catalog keeps changing")


async def _together(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Does them all. When one fails the others go on, each being a move of its own; the first failure is raised"""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
