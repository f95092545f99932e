"""What was forgotten when: what was known before a forgetting must not be remembered after it. Pure.

What is to be remembered says as of when it lacks nothing (`Stamp.fresh_at`): for a primary's answer that is when it
was asked, for a replica's when it was last known to have everything. If there was a forgetting at that time or later,
it may be what was to be forgotten. Forgettings are noted for groups of keys, so that their number is bounded whatever
is forgotten; a key that shares its group with one that was forgotten is not remembered either: that costs a look more.
"""

import math
import time
from array import array
from collections.abc import Callable

# Of 8 bytes each. With a thousand changes a second, and reads of 10 ms, one read in six thousand is not remembered.
_GROUPS = 1 << 16


class Forgettings:
    """When each group of keys was forgotten last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = array("d", [-math.inf]) * _GROUPS
        self._last_of_all = -math.inf

    def forget(self, key: str) -> None:
        """What was known of a key until now counts for nothing."""
        self._last[hash(key) % _GROUPS] = self._clock()

    def forget_all(self) -> None:
        """Nor does what was known of any other."""
        self._last_of_all = self._clock()

    def last(self, key: str) -> float:
        """When a key may have been forgotten last."""
        return max(self._last[hash(key) % _GROUPS], self._last_of_all)

    def since(self, key: str, at: float) -> bool:
        """Whether there may have been a forgetting of a key at this time of the clock, or later."""
        return self.last(key) >= at
