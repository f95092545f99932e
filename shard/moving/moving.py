"""What the steps of a move share: its record, its two sides, its streams, and what is known only to this process."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from common import catalog, catalog_moves
from common.config import MoverSettings
from common.moves import Move, Step
from common.postgres import Connection
from shard.moving.changed import ChangeLog, Key
from shard.moving.side import Side
from shard.moving.streams import Stream
from shard.moving.verify import Verifier

Tell = Callable[[dict[str, Any]], None]

_READ_PRIMARY = "SELECT primary_server FROM sync_sets WHERE shard_id = $1"
_NAME = "SELECT current_setting('cluster_name')"


class MoveError(Exception):
    """A move cannot go on as it is; the message says why. It can be resumed or rolled back."""


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
    comparison: Comparison | None = None
    fenced_at: float | None = None
    """When writes were stopped, by the monotonic clock."""
    may_be_decided: bool = False
    """Whether the catalog was asked to have the taker own the slots: whether it does then is for it alone to say."""
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
        move = self.move
        self.tell(
            {
                "event": "move",
                "move_id": move.move_id,
                "step": move.step.value,
                "first": move.first,
                "last": move.last,
                "source": move.source,
                "target": move.target,
                "attempts": move.attempts,
                **({"error": move.error} if move.error else {}),
                **more,
            }
        )

    async def hand_over(self, step: Step, giver: Side, taker: Side, timeline: int, lsn: int) -> None:
        """The compare-and-set after which there is no way back. Raises MoveConflictError, MoveError."""
        for _ in range(5):
            epoch = await catalog.read_epoch(self.catalog)
            # After the epoch: whoever is replaced from now on, the compare-and-set fails.
            for side in (giver, taker):
                await self._require_primary(side)
            self.may_be_decided = True
            try:
                self.move = await catalog_moves.hand_over(
                    self.catalog,
                    epoch,
                    self.move,
                    replace(self.move, step=step, error="", cutover_at=datetime.now(UTC)),
                    giver=giver.shard_id,
                    taker=taker.shard_id,
                    timeline=timeline,
                    lsn=lsn,
                )
            except catalog.EpochConflictError:
                continue
            self.told()
            return
        raise MoveError("the catalog keeps changing")

    def since_fence_s(self) -> float:
        """Seconds since writes were stopped; 0 when this process has not."""
        return 0.0 if self.fenced_at is None else time.monotonic() - self.fenced_at

    def lap(self, part: str) -> None:
        """Another part of the hand-over is over."""
        self.laps[part] = round(self.since_fence_s() * 1000)

    async def _require_primary(self, side: Side) -> None:
        recorded = await self.catalog.fetchval(_READ_PRIMARY, side.shard_id)
        name = await side.connection.fetchval(_NAME)
        if recorded is not None and name and recorded != name:
            raise MoveError(f"{recorded} is the primary of {side.shard_id} by now, and not {name}")

    def _stream(self, publisher: Side, subscriber: Side, way: str) -> Stream:
        return Stream(publisher, subscriber, self.move.move_id, way, self.move.first, self.move.last)
