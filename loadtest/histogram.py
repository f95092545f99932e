"""Latencies in bounded memory, exact to one part in a thousand, and merged without loss over processes.

The buckets are those of HdrHistogram (G. Tene, hdrhistogram.org): values in whole microseconds; up to 2,047 each has a
bucket of its own, and above that every doubling is cut into 1,024. A bucket stands for its highest value, so that no
percentile is told too low.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

_SUB_BITS = 10
_SUB = 1 << _SUB_BITS
_MICROSECONDS = 1_000_000
_LONGEST_US = 24 * 3600 * _MICROSECONDS


class Histogram:
    """How often calls took how long."""

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self._counts: Counter[int] = Counter(counts or {})
        self.count = sum(self._counts.values())
        """Calls in it."""

    def record(self, seconds: float) -> None:
        """One call that took so long."""
        self._counts[_bucket(min(max(0, round(seconds * _MICROSECONDS)), _LONGEST_US))] += 1
        self.count += 1

    def merge(self, other: "Histogram") -> None:
        """Adds all of another's."""
        self._counts.update(other._counts)
        self.count += other.count

    def percentile(self, share: float) -> float:
        """Seconds that a share (0 to 1) of the calls took at most, by nearest rank; 0 without any call."""
        rank = max(1, _ceil(share * self.count))
        seen = 0
        for bucket, count in sorted(self._counts.items()):
            seen += count
            if seen >= rank:
                return _highest(bucket) / _MICROSECONDS
        return 0.0

    @property
    def fastest(self) -> float:
        """Seconds of the fastest call; 0 without any."""
        return _highest(min(self._counts)) / _MICROSECONDS if self._counts else 0.0

    @property
    def slowest(self) -> float:
        """Seconds of the slowest call; 0 without any."""
        return _highest(max(self._counts)) / _MICROSECONDS if self._counts else 0.0

    @property
    def total_s(self) -> float:
        """Seconds of all calls together."""
        return sum(_highest(bucket) * count for bucket, count in self._counts.items()) / _MICROSECONDS

    @property
    def average(self) -> float:
        """Seconds of an average call; 0 without any."""
        return self.total_s / self.count if self.count else 0.0

    def values(self) -> Iterator[tuple[float, int]]:
        """(seconds, calls), from the fastest to the slowest."""
        for bucket, count in sorted(self._counts.items()):
            yield _highest(bucket) / _MICROSECONDS, count

    def to_json(self) -> dict[str, int]:
        """As it travels between processes."""
        return {str(bucket): count for bucket, count in self._counts.items()}

    @classmethod
    def from_json(cls, counts: Mapping[str, int]) -> "Histogram":
        """What `to_json` gave."""
        return cls({int(bucket): count for bucket, count in counts.items()})


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All of them in one."""
    whole = Histogram()
    for histogram in histograms:
        whole.merge(histogram)
    return whole


def _bucket(value: int) -> int:
    shift = max(0, value.bit_length() - _SUB_BITS - 1)
    return (shift << (_SUB_BITS + 1)) + (value >> shift)


def _highest(bucket: int) -> int:
    shift, value = bucket >> (_SUB_BITS + 1), bucket & (2 * _SUB - 1)
    return ((value + 1) << shift) - 1


def _ceil(value: float) -> int:
    # A product such as 0.99 * 100 is a hair above the whole number that is meant.
    return -int(-(value - 1e-9) // 1)
