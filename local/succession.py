"""Who takes a dead primary's place, and when a standby has to be made anew. Pure."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from common.sync_set import Progress, SyncSet, promotable

# A standby that answers, and for this long neither streams nor gets on, will not do so by itself.
STUCK_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class Succession:
    """The server to promote, and the standbys that its commits wait for from the start."""

    primary: str
    members: frozenset[str]


def succession(sync_set: SyncSet, reached: Mapping[str, Progress], wanted: str | None = None) -> Succession | None:
    """Who is to be promoted, given how far those are that were reached; None when nobody may be.

    `wanted` instead of the most advanced one, if it has as much. The new set holds those members that have all that
    the new primary has: one that is behind could not take over in turn without losing what the old set acknowledged.
    """
    first = promotable(sync_set, reached)
    if first is None:
        return None
    members = (sync_set.members | (sync_set.following or frozenset())) & reached.keys()
    level = {name for name in members if reached[name] >= reached[first]}
    if wanted is not None and wanted not in level:
        return None
    primary = wanted or first
    return Succession(primary, frozenset(level - {primary}))


@dataclass(slots=True)
class StuckWatch:
    """Tells when a standby has to be made anew, from what is seen of it while its primary lives."""

    clock: Callable[[], float] = time.monotonic
    _since: dict[str, tuple[float, Progress]] = field(default_factory=dict, init=False)

    def is_stuck(self, name: str, progress: Progress | None, *, streams: bool) -> bool:
        """`progress` is None when it does not answer: it may be frozen, being made, or at its recovery; that passes."""
        if streams or progress is None:
            self._since.pop(name, None)
            return False
        since, before = self._since.get(name, (self.clock(), progress))
        if progress != before:
            since = self.clock()
        self._since[name] = (since, progress)
        return self.clock() - since >= STUCK_AFTER_S

    def forget(self, name: str) -> None:
        """It is being made anew."""
        self._since.pop(name, None)
