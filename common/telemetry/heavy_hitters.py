"""Who is asked about most, in bounded memory, however many there are. Pure.

SpaceSaving (A. Metwally, D. Agrawal and A. El Abbadi, "Efficient Computation of Frequent and Top-k Elements in Data
Streams", ICDT 2005): of n counted items, each whose true count is above n / capacity is in the list, and a count is too
high by at most its `error`, and never too low. Counts are halved now and then, so that the list is about the last
minutes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Hitter(Generic[T]):
    """One item, with its count, and by how much that may be too high."""

    item: T
    count: float
    error: float


class HeavyHitters(Generic[T]):
    """The `capacity` items counted most. Counts lose half of their weight every `half_life_s` seconds."""

    def __init__(self, capacity: int, half_life_s: float, clock: Callable[[], float]) -> None:
        if capacity < 1 or half_life_s <= 0:
            raise ValueError("a list needs room for one item at least, and time to forget in")
        self._capacity = capacity
        self._half_life_s = half_life_s
        self._clock = clock
        self._halved_at = clock()
        # By count and back: buckets of equal counts would make an eviction O(1); with a hundred items a search of the
        # least is a few microseconds, and only for who is not among them.
        self._hitters: dict[T, Hitter[T]] = {}
        self.total = 0.0
        """All that was counted, weighted as the counts are."""

    def add(self, item: T) -> None:
        """Counts one."""
        if self._clock() - self._halved_at >= self._half_life_s:
            self._halve()
        self.total += 1
        hitter = self._hitters.get(item)
        if hitter is not None:
            hitter.count += 1
        elif len(self._hitters) < self._capacity:
            self._hitters[item] = Hitter(item, 1, 0)
        else:
            least = min(self._hitters.values(), key=_count)
            del self._hitters[least.item]
            self._hitters[item] = Hitter(item, least.count + 1, least.count)

    def forget(self, item: T) -> None:
        """Drops an item, as if it had not been counted."""
        self._hitters.pop(item, None)

    def top(self, most: int) -> list[Hitter[T]]:
        """The first of them, by count; ties as they came."""
        return sorted(self._hitters.values(), key=_count, reverse=True)[:most]

    def _halve(self) -> None:
        now = self._clock()
        factor = 0.5 ** ((now - self._halved_at) // self._half_life_s)
        self._halved_at = now
        self.total *= factor
        for hitter in self._hitters.values():
            hitter.count *= factor
            hitter.error *= factor


def _count(hitter: Hitter[T]) -> float:
    return hitter.count
