"""What is counted of one layer of a cache."""

import time
from collections.abc import Callable
from typing import Literal

from common.telemetry.registry import CACHE_REQUESTS
from common.window import SlidingCount

_SLICE_S = 30.0
_SLICES = 10

Result = Literal["hit", "miss", "unavailable"]


class CacheLayer:
    """Counts looks, by what they found."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._counters = {result: CACHE_REQUESTS.labels(name, result) for result in ("hit", "miss", "unavailable")}
        self._hits = SlidingCount(_SLICE_S, _SLICES, clock)
        self._looks = SlidingCount(_SLICE_S, _SLICES, clock)

    def looked(self, result: Result) -> None:
        """One look."""
        self._counters[result].inc()
        self._looks.add()
        if result == "hit":
            self._hits.add()

    @property
    def hit_ratio(self) -> float | None:
        """Share of the looks of the last five minutes that found something; None without any."""
        looks = self._looks.total()
        return self._hits.total() / looks if looks else None
