"""Deciding about the sync set: who is lost, who is ready, which set to change to, and when it is in force. Pure.

common/sync_set.py says what a set promises, and why it changes in two steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.sync_set import SyncSet, required, setting

# A standby this close behind is taken into the set: what is missing is flushed within the time that a commit takes.
_CLOSE_BYTES = 16 * 1024 * 1024

# The processes that release waiting commits read a new setting when they are told to, each for itself, and not all of
# them show that they have. They need milliseconds.
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Standby:
    """A standby that is connected, as its primary sees it."""

    is_streaming: bool
    flushed: int
    is_counted: bool
    """Whether the process that serves it counts it for commits that wait."""


@dataclass(frozen=True, slots=True)
class View:
    """The primary, as it sees itself. `lsn` is what it had flushed before its standbys were looked at."""

    server: str
    setting: str
    lsn: int
    standbys: Mapping[str, Standby]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the standbys: those that nobody should wait for any more, and those that may be waited for."""

    lost: frozenset[str]
    ready: frozenset[str]


class Watch:
    """How long each standby has flushed nothing, though there was something to flush, or was not there at all."""

    def __init__(self, loss_s: float, longest_gap_s: float) -> None:
        """Of the time between two looks at most `longest_gap_s` counts: who did not look cannot say who was there."""
        self._loss_s = loss_s
        self._longest_gap_s = longest_gap_s
        self._looked_at: float | None = None
        self._flushed: dict[str, int] = {}
        self._idle_s: dict[str, float] = {}

    def look(self, names: frozenset[str], view: View, now: float) -> Seen:
        """Takes note of a look at the primary, for those of `names` and those that are connected."""
        passed_s = 0.0 if self._looked_at is None else min(now - self._looked_at, self._longest_gap_s)
        self._looked_at = now
        watched = names | view.standbys.keys()
        for name in watched:
            standby = view.standbys.get(name)
            if standby is not None and (standby.flushed != self._flushed.get(name) or standby.flushed >= view.lsn):
                self._flushed[name], self._idle_s[name] = standby.flushed, 0.0
            else:
                self._idle_s[name] = self._idle_s.get(name, 0.0) + passed_s
        for gone in self._idle_s.keys() - watched:
            del self._idle_s[gone]
            self._flushed.pop(gone, None)
        return Seen(
            lost=frozenset(name for name in watched if self._idle_s[name] >= self._loss_s),
            # One that has stopped flushing is connected still, and close for a while.
            ready=frozenset(
                name
                for name, standby in view.standbys.items()
                if standby.is_streaming and not self._idle_s[name] and view.lsn - standby.flushed <= _CLOSE_BYTES
            ),
        )


def target(recorded: SyncSet, seen: Seen, *, may_degrade: bool) -> frozenset[str]:
    """The set that should be in force, given what the catalog has.

    A change that has begun is finished first: what was acknowledged meanwhile may be on the following set only. When
    that set has lost its quorum, there is one way that needs nobody: to nobody, from where no standby may be promoted.
    """
    if (following := recorded.following) is not None:
        can_finish = len(following - seen.lost) >= required(len(following))
        return following if can_finish or not may_degrade else frozenset()
    wanted = (recorded.members - seen.lost) | seen.ready
    return wanted if wanted or may_degrade else recorded.members


class Settling:
    """When a set is in force: whatever is acknowledged from then on, and was before, is on a quorum of it."""

    def __init__(self, members: frozenset[str], changed_at: float | None) -> None:
        """`changed_at`: when the setting was changed to it; None: it was found so."""
        self.members = members
        self._changed_at = changed_at
        self._mark: int | None = None

    def is_in_force(self, view: View, now: float) -> bool:
        """Asked with each look until it is."""
        if view.setting != setting(self.members):
            return False
        if not self.members:
            return True
        if any(standby.is_counted != (name in self.members) for name, standby in view.standbys.items()):
            self._mark = None
            return False
        if self._changed_at is not None and now - self._changed_at < _SETTLE_S:
            return False
        if self._mark is None:
            # What was acknowledged under another setting, by a process that had not read this one yet, is before here.
            self._mark = view.lsn
        caught_up = sum(name in self.members and s.flushed >= self._mark for name, s in view.standbys.items())
        return caught_up >= required(len(self.members))
