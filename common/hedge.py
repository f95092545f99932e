"""When to ask a second server for a read that takes long, without asking twice as much of everybody. Pure.

A hedge is sent when a read has taken longer than 95 of 100 do (J. Dean and L. A. Barroso, "The Tail at Scale",
Communications of the ACM 56:2, 2013), and while hedges are at most 2 % of all reads. The second bound is what keeps a
slow shard from being asked twice for everything: when all reads are slow, all of them are late.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

_ALPHA = 0.05
_GAMMA = (1 + _ALPHA) / (1 - _ALPHA)
_LOG_GAMMA = math.log(_GAMMA)
# What is outside is counted at the ends: a read does not take less than 0.1 ms, and nobody waits for a minute.
_LEAST_S = 1e-4
_MOST_S = 60.0
_FIRST_BUCKET = math.ceil(math.log(_LEAST_S) / _LOG_GAMMA)
_BUCKETS = math.ceil(math.log(_MOST_S) / _LOG_GAMMA) - _FIRST_BUCKET + 1
_SLICES = 6
# The quantile moves slowly; reading 134 buckets ten times a second instead of with each read saves 5 µs of each.
_FRESH_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeSettings:
    """When a read is hedged. Raises ValueError for what cannot work."""

    quantile: float = 0.95
    """Share of reads that are answered before a hedge is thought of. More are late than `HedgeBudget` pays for, so it
    is spent on those that are late first, not on those that are late most; at 1 less its share, on the latter."""

    floor_s: float = 0.005
    """Seconds that no hedge is sent before: under load a router's own event loop delays answers by some of these."""

    min_samples: int = 100
    """Reads to have seen before hedging: five of 100 are above the quantile, fewer say little."""

    window_s: float = 60.0
    """Seconds that the quantile looks back on."""

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1 or self.floor_s < 0 or self.min_samples < 1 or self.window_s <= 0:
            raise ValueError("a hedge needs a quantile between 0 and 1, and samples to take it from")


class HedgeTimer:
    """How long one kind of read gets before it is hedged."""

    def __init__(self, clock: Callable[[], float], settings: HedgeSettings | None = None) -> None:
        self._settings = settings or HedgeSettings()
        self._clock = clock
        self._window = LatencyWindow(self._settings.window_s, clock)
        self._delay_s: float | None = None
        self._fresh_until = -math.inf

    def observe(self, duration_s: float) -> None:
        """How long one server took for the answer to a read. Of a read that was hedged, both count, the one that was
        cancelled with the time it had until then: the winners alone would make the next hedges earlier and earlier, as
        would refusals, which come at once."""
        self._window.add(duration_s)

    def delay_s(self) -> float | None:
        """Seconds after which to ask a second server; None while too little is known. At most 0.1 s old."""
        now = self._clock()
        if now >= self._fresh_until:
            self._fresh_until = now + _FRESH_S
            observed_s = self._window.quantile(self._settings.quantile)
            if observed_s is None or self._window.count < self._settings.min_samples:
                self._delay_s = None
            else:
                self._delay_s = max(observed_s, self._settings.floor_s)
        return self._delay_s


class HedgeBudget:
    """Hedges as a share of reads: of any n reads in a row at most `share * n + burst` are hedged, and of all reads
    since the start at most `share`."""

    def __init__(self, share: float = 0.02, burst: int = 10) -> None:
        if not 0 < share <= 1 or burst < 1:
            raise ValueError("hedges are a share above 0 and up to 1 of reads, and one at least can be saved up")
        # Counted in whole reads, since a sum of many 0.02 is not what it should be.
        self._price = math.ceil(1 / share)
        self._most = burst * self._price
        self._credit = 0

    def read(self) -> None:
        """A read began. Its hedge is none."""
        self._credit = min(self._credit + 1, self._most)

    def spend(self) -> bool:
        """Takes leave for one hedge, if there is any left. Ask when the delay is over, not before."""
        if self._credit < self._price:
            return False
        self._credit -= self._price
        return True


class LatencyWindow:
    """Quantiles of the durations of the last `window_s` seconds (down to 5/6 of them), in bounded memory.

    Buckets grow by the factor g = (1 + a) / (1 - a): a duration d is in bucket ceil(log(d) / log(g)), and
    2 * g ** i / (g + 1) is within a = 5 % of all that bucket i holds (C. Masson, J. E. Rim and H. K. Lee, "DDSketch",
    PVLDB 12:12, 2019, section 2). From 0.1 ms to 60 s that makes 134 buckets.
    """

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._slice_s = window_s / _SLICES
        self._clock = clock
        self._slices = [[0] * _BUCKETS for _ in range(_SLICES)]
        self._newest = self._number()
        self._totals = [0] * _BUCKETS
        self.count = 0

    def add(self, duration_s: float) -> None:
        """Counts a duration as of now."""
        self.roll()
        bucket = math.ceil(math.log(min(max(duration_s, _LEAST_S), _MOST_S)) / _LOG_GAMMA) - _FIRST_BUCKET
        self._slices[self._newest % _SLICES][bucket] += 1
        self._totals[bucket] += 1
        self.count += 1

    def quantile(self, q: float) -> float | None:
        """The duration, in seconds, that a share `q` of the window's reaches at most (nearest rank); None without any.

        Within 5 % of the true one.
        """
        self.roll()
        rank = max(1, math.ceil(q * self.count))
        seen = 0
        for bucket, count in enumerate(self._totals):
            seen += count
            if seen >= rank:
                return 2 * _GAMMA ** (bucket + _FIRST_BUCKET) / (_GAMMA + 1)
        return None

    def roll(self) -> None:
        """Forgets what is older than the window; `count` is right after it."""
        now = self._number()
        for number in range(max(self._newest + 1, now - _SLICES + 1), now + 1):
            old = self._slices[number % _SLICES]
            self._slices[number % _SLICES] = [0] * _BUCKETS
            self._totals = [total - count for total, count in zip(self._totals, old, strict=True)]
            self.count -= sum(old)
        self._newest = max(self._newest, now)

    def _number(self) -> int:
        return int(self._clock() // self._slice_s)
