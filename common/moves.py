"""A move of slots from one shard to another: its steps, and what the catalog records of it.

| step | what is being done, or was | who has the slots | how it ends otherwise |
|---|---|---|---|
| planned | nothing yet | source | rolling_back |
| copying | the rows are copied, and followed by logical replication | source | rolling_back |
| verifying | both sides are compared while writes go on | source | rolling_back |
| reversing | the way back is made: a slot on the target, a subscription on the source | source | rolling_back |
| fenced | nobody writes to the slots; the last rows go over and are compared | source | verifying, or rolling_back |
| cut_over | the catalog names the target: the point of no return. Both shards are told | target | goes on |
| active | the target serves; what is written there goes back to the source | target | returning |
| cleaning | the way back is closed, the source's rows are removed | target | goes on |
| done | | target | |
| returning | the slots are fenced on the target, the last rows go back | target | active again |
| returned | the catalog names the source again. Both shards are told | source | goes on |
| rolling_back | everything that was made is removed, and the target's rows | source | goes on |
| rolled_back | | source | |
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum


class Step(StrEnum):
    """What is being done. It is recorded before it is begun, so that whoever comes next knows what there may be."""

    PLANNED = "planned"
    COPYING = "copying"
    VERIFYING = "verifying"
    REVERSING = "reversing"
    FENCED = "fenced"
    CUT_OVER = "cut_over"
    ACTIVE = "active"
    CLEANING = "cleaning"
    DONE = "done"
    RETURNING = "returning"
    RETURNED = "returned"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"

    @property
    def is_final(self) -> bool:
        """Whether nothing is left to be done."""
        return self in (Step.DONE, Step.ROLLED_BACK)

    @property
    def is_before_cutover(self) -> bool:
        """Whether the source has the slots, and the move can simply be undone."""
        return self in (Step.PLANNED, Step.COPYING, Step.VERIFYING, Step.REVERSING, Step.FENCED)


# Nobody takes writes to the slots, or is about to take none; whether or not it says when that began.
_FENCED = (Step.FENCED, Step.CUT_OVER, Step.RETURNED)
# Somebody takes writes; a time of a fence is one of the past.
_WRITTEN = (Step.ACTIVE, Step.CLEANING, Step.DONE, Step.ROLLED_BACK)

# A source that keeps its rows for longer than this had better keep its slots.
MAX_ROLLBACK_WINDOW_S = 7 * 86400

UNFENCED = "the mover died while it fenced"
"""The error of a move whose fence was taken away. One that returns is still to return then."""
WAY_BACK_CLOSED = "a failover has closed the way back; move the slots there anew"
"""The error of a move that has gone over and cannot be brought back any more. It stays with the move."""
WAY_BACK_LOST = "the way back is closed, its replication slot is gone or was invalidated; move the slots there anew"
"""The same, when what was written since has not been kept for the source."""
TARGET_LOST = "its target was given up as lost; what that had of the slots is no concern of anybody's"
"""The error of a move that was rolled back without its target."""
WAYS_BACK_CLOSED = (WAY_BACK_CLOSED, WAY_BACK_LOST)


@dataclass(frozen=True, slots=True)
class Move:
    """A move as the catalog has it. Slots `first` to `last` are both included."""

    move_id: int
    first: int
    last: int
    source: str
    target: str
    step: Step
    version: int = 1
    attempts: int = 1
    source_timeline: int = 0
    target_timeline: int = 0
    rows: int = 0
    """Rows that were compared, of all tables."""
    fenced_at: datetime | None = None
    """Since when there may be a fence: set before it is made, kept until a shard has confirmed that it takes writes."""
    cutover_at: datetime | None = None
    cutover_epoch: int = 0
    rollback_window_s: float = 30.0
    """Seconds after the slots went over in which they can be brought back: the move's own, whoever drives it."""
    error: str = ""
    """Why it stopped last, for people."""

    @property
    def slots(self) -> int:
        """How many slots it moves."""
        return self.last - self.first + 1

    @property
    def rollback_until(self) -> datetime | None:
        """When its way back is closed, if that is still to come. None: the slots have not gone over, so that it can be
        undone at any time, or it is too late, or there is no time for it."""
        if self.cutover_at is None or self.step not in (Step.CUT_OVER, Step.ACTIVE) or not self.rollback_window_s:
            return None
        return self.cutover_at + timedelta(seconds=self.rollback_window_s)

    def is_overdue(self, now: datetime) -> bool:
        """Whether it is too late to bring it back, and nobody has begun to clean up."""
        over_since = self.cutover_at and self.cutover_at + timedelta(seconds=self.rollback_window_s)
        return self.step is Step.ACTIVE and over_since is not None and over_since < now

    @property
    def may_be_fenced(self) -> bool:
        """Whether there may be nobody who takes writes to the slots."""
        return self.step in _FENCED or (self.fenced_at is not None and self.step not in _WRITTEN)


@dataclass(frozen=True, slots=True)
class OpenMove:
    """A move that is not over."""

    move: Move
    is_driven: bool
    """Somebody has its lease, and so is at work on it."""
    is_long_overdue: bool = False
    """It is overdue, and has been for longer than whoever waits for that may need to begin."""

    @property
    def is_stopped(self) -> bool:
        """Whether it stays as it is until somebody resumes it or rolls it back. One that is active waits without a
        lease until its time to be brought back is over; then whoever waited is at work on it, or has died."""
        return not self.is_driven and (self.move.step is not Step.ACTIVE or self.is_long_overdue)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the moves of a cluster are."""

    open: tuple[OpenMove, ...] = ()
    """Oldest first."""
    ended: Mapping[Step, int] = field(default_factory=dict)
    """How many were ever done, and rolled back."""
