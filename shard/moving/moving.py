"""What the steps of a move share: its record, its two sides, its streams, and what is known only to this process."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from common import catalog, catalog_moves
from common.catalog_moves import Standing
from common.config import MoverSettings
from common.moves import Move, Step
from common.postgres import Connection
from shard.moving import ownership
from shard.moving.changed import ChangeLog, Key
from shard.moving.ownership import Departure
from shard.moving.pacing import Pace
from shard.moving.side import Side
from shard.moving.streams import Stream
from shard.moving.verify import Verifier
from shard.position import Position

Tell = Callable[[dict[str, Any]], None]

# How long the catalog may take over the deadline of a fence to say whether it has recorded a hand-over.
_DECISION_TIMEOUT_S = 5.0


class MoveError(Exception):
    """A move cannot go on as it is; the message says why. It can be resumed or rolled back."""


def event_of(move: Move) -> dict[str, Any]:
    """What is told of a move, wherever it is."""
    return {
        "event": "move",
        "move_id": move.move_id,
        "step": move.step.value,
        "first": move.first,
        "last": move.last,
        "source": move.source,
        "target": move.target,
        "attempts": move.attempts,
        **({"error": move.error} if move.error else {}),
    }


class Turn:
    """One move's turn to hand over, of all those of a mover: side by side, each pause would be as long as both."""

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._is_ours = False

    async def take(self) -> None:
        """Returns when it is this move's turn. To be asked for before anything is fenced."""
        if not self._is_ours:
            await self._lock.acquire()
            self._is_ours = True

    async def others(self) -> None:
        """Returns when no other move hands over: what is not urgent leaves the servers to it meanwhile."""
        if not self._is_ours:
            async with self._lock:
                pass

    def end(self) -> None:
        """Lets the next one have its turn, if this one has it."""
        if self._is_ours:
            self._is_ours = False
            self._lock.release()


@dataclass
class Comparison:
    """What was compared while writes went on, and the rows that have to be looked at again."""

    verifier: Verifier
    changes: ChangeLog
    suspects: dict[str, set[Key]] = field(default_factory=dict)


@dataclass
class Moving:
    """A move that is being driven. Changes of the catalog are made on the connection that holds its lease."""

    catalog: Connection
    settings: MoverSettings
    move: Move
    source: Side
    target: Side
    tell: Tell
    turn: Turn
    pace: Pace
    comparison: Comparison | None = None
    _ahead: Standing | None = None
    """What the catalog had before the fence."""
    fenced_at: float | None = None
    """When writes were stopped, by the monotonic clock."""
    may_be_decided: bool = False
    """Whether the catalog was asked to have the taker own the slots: whether it does then is for it alone to say."""
    departure: Departure | None = None
    """What callers are told of the hand-over, when this process has done it."""
    copied: int = 0
    """Rows that the copy took over, all tables together."""
    laps: dict[str, int] = field(default_factory=dict)
    """How far each part of the hand-over was over, in ms since then."""

    @property
    def forward(self) -> Stream:
        """From the source to the target."""
        return self._stream(self.source, self.target, "forward")

    @property
    def reverse(self) -> Stream:
        """From the target to the source."""
        return self._stream(self.target, self.source, "reverse")

    def changes(self, stream: Stream) -> ChangeLog:
        """What changes on the publisher of a stream."""
        return ChangeLog(stream.publisher, stream.name)

    async def advance(self, step: Step, **changes: Any) -> None:
        """Records the step that comes next, before it is begun. Raises MoveConflictError."""
        self.move = await catalog_moves.change_move(
            self.catalog, self.move, replace(self.move, step=step, **{"error": "", **changes})
        )
        self.told()

    def told(self, **more: Any) -> None:
        """Tells where the move is."""
        self.tell({**event_of(self.move), **more})

    async def rehearse(self, giver: Side, taker: Side) -> None:
        """Has everybody make ready for what is asked of them while nobody may write (`ownership.rehearse`)."""
        await ownership.rehearse(giver, taker)
        self._ahead = await self._standing(giver, taker)
        with suppress(catalog.EpochConflictError):
            # There never is an epoch 0.
            await self._recorded(replace(self._ahead, epoch=0), self.move, giver, taker, (0, 0))

    async def hand_over(self, step: Step, giver: Side, taker: Side, here: Position, deadline: float) -> None:
        """The compare-and-set after which there is no way back. It is asked for before `deadline`, by the monotonic
        clock, or not at all. Raises MoveConflictError, MoveError, CONNECT_ERRORS.
        """
        for _ in range(5):
            # What was read before the fence will do for as long as the epoch is still that one.
            standing, self._ahead = self._ahead, None
            if standing is None:
                async with asyncio.timeout(deadline - time.monotonic()):
                    standing = await self._standing(giver, taker)
            if time.monotonic() >= deadline:
                raise TimeoutError
            self.may_be_decided = True
            changed = replace(self.move, step=step, error="", cutover_at=datetime.now(UTC))
            decision = self._recorded(standing, changed, giver, taker, (here.timeline, here.lsn))
            try:
                self.move = await self._undisturbed(decision, deadline - time.monotonic() + _DECISION_TIMEOUT_S)
            except catalog.EpochConflictError:
                self.may_be_decided = False
                continue
            self.departure = Departure(taker.shard_id, standing.address, self.move.cutover_epoch, here)
            self.told()
            return
        raise MoveError("the catalog keeps changing")

    def since_fence_s(self) -> float:
        """Seconds since writes were stopped; 0 when this process has not."""
        return 0.0 if self.fenced_at is None else time.monotonic() - self.fenced_at

    def lap(self, part: str) -> None:
        """Another part of the hand-over is over."""
        self.laps[part] = round(self.since_fence_s() * 1000)

    async def _undisturbed(self, decision: Coroutine[Any, Any, Move], within_s: float) -> Move:
        """What comes of a commit that must not be cancelled: one that waits for standbys would be seen from then on,
        and be gone with the server. When it takes too long the session is left instead, and whether it was done is not
        known then. Raises CONNECT_ERRORS.
        """
        task = asyncio.create_task(decision)
        try:
            await asyncio.wait({task}, timeout=within_s)
        finally:
            if not task.done():
                self.catalog.terminate()
                await asyncio.wait({task})
        return await task

    async def _standing(self, giver: Side, taker: Side) -> Standing:
        """What the catalog has. The primaries are of the moment of the epoch: whoever is replaced from then on, the
        compare-and-set fails. Raises MoveError when one of ours has been replaced.
        """
        standing = await catalog_moves.read_standing(self.catalog, giver.shard_id, taker.shard_id)
        for side in (giver, taker):
            recorded = standing.primaries.get(side.shard_id, side.server)
            if side.server and recorded != side.server:
                raise MoveError(f"{recorded} is the primary of {side.shard_id} by now, and not {side.server}")
        return standing

    async def _recorded(self, standing: Standing, changed: Move, giver: Side, taker: Side, at: tuple[int, int]) -> Move:
        return await catalog_moves.hand_over(
            self.catalog, standing, self.move, changed, giver.shard_id, taker.shard_id, at
        )

    def _stream(self, publisher: Side, subscriber: Side, way: str) -> Stream:
        return Stream(publisher, subscriber, self.move.move_id, way, self.move.first, self.move.last)
