"""Which share of requests a process lets in, found by how late its event loop is. Pure.

A process that is asked for more than it can do is late with everything, with its refusals too: its work waits in the
event loop's queue, where no limit of calls in flight to others sees it. So the time in that queue is held near a
target, by letting in a smaller share. Queueing time as the sign of overload, and batches that make way first, are after
H. Zhou et al., "Overload Control for Scaling WeChat Microservices" (SoCC 2018, sections 4.1 and 4.2). The share follows
the lateness in proportion, where theirs takes fixed steps:

    openness *= 1 + gain * clamp((target - lateness) / target, -1, growth)
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from common.limiter import Priority

# Of openness: all batches and all others. At 1, no batch and all others; below, that share of the others.
_ALL = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShedderSettings:
    """How late is too late, and how fast the share follows. Raises ValueError for what cannot work."""

    target_s: float = 0.008
    """Seconds that the event loop may be late. Half of the 20 ms within which a refusal is to arrive, less the way."""

    gain: float = 0.3
    """Change of the share in one look that finds the loop twice as late as it may be, or more."""

    growth: float = 0.2
    """Share of the gain with which it grows again: by 6 % in a look that finds the loop in time."""

    least_openness: float = 0.02
    """It never lets in less: what is let in is how it finds out that it may let in more."""

    undisturbed: int = 128
    """Young requests at work up to which nothing is refused, however late the loop is.

    With so few it is others who keep the machine busy, and to refuse them would not help; or it is a team of agents
    that each wait for their answer, whose queue never grows. An open crowd is past this within a moment."""

    looks: int = 3
    """Looks in a row that must have found more at work: one burst is over before it could be refused."""

    def __post_init__(self) -> None:
        if self.target_s <= 0 or not 0 < self.gain < 1 or not 0 < self.growth <= 1 or not 0 < self.least_openness <= 1:
            raise ValueError("a shedder needs a target above 0, and a gain, a growth and a least openness up to 1")


class Shedder:
    """Lets requests in or not. `observe` at regular intervals of a tenth of a second or so."""

    def __init__(self, settings: ShedderSettings | None = None, uniform: Callable[[], float] = random.random) -> None:
        self._settings = settings or ShedderSettings()
        self._uniform = uniform
        self.at_work = 0
        """Requests that were let in lately, and are not answered yet. The caller counts. Those that have waited long
        for somebody else, as for a shard that answers nothing, are no work of this process."""
        self._openness = _ALL
        self._looks_with_many = 0

    def share(self, priority: Priority) -> float:
        """The share of requests that are let in, 0 to 1."""
        if priority is Priority.BATCH:
            return max(0.0, self._openness - 1)
        return min(1.0, self._openness)

    def observe(self, late_s: float) -> None:
        """The event loop was this late, in seconds, on average since the last look."""
        settings = self._settings
        self._looks_with_many = self._looks_with_many + 1 if self.at_work > settings.undisturbed else 0
        room = min(max((settings.target_s - late_s) / settings.target_s, -1.0), settings.growth)
        openness = self._openness * (1 + settings.gain * room)
        self._openness = min(max(openness, settings.least_openness), _ALL)

    def admits(self, priority: Priority = Priority.INTERACTIVE) -> bool:
        """Whether to let one more in."""
        if self._looks_with_many < self._settings.looks:
            return True
        share = self.share(priority)
        return share >= 1 or self._uniform() < share
