"""Who is asked about most, in bounded memory, however many there are. Pure.

SpaceSaving (A. Metwally, D. Agrawal and A. El Abbadi, "Efficient Computation of Frequent and Top-k Elements in Data
Streams", ICDT 2005): of n counted items, each whose true count is above n / capacity is in the list, and a count is too
high by at most its `error`, and never too low. Counts are halved now and then, so that the list is about the last
minutes. Forgetting, which the paper lacks, makes room on the list: whoever comes into that may have been counted before
and put out, like anybody else who is new.
"""

import heapq
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
        self._hitters: dict[T, Hitter[T]] = {}
        # Each of them once, with its count at the time it was put here: the least is at the top once those that have
        # grown meanwhile are put where they belong. The number is for those that count the same.
        self._heap: list[tuple[float, int, Hitter[T]]] = []
        self._number = 0
        # What those who are not on the list may have been counted, at most: what the last had who was put out of it.
        self._floor = 0.0
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
            return
        if len(self._hitters) >= self._capacity:
            self._floor = self._evict()
        hitter = self._hitters[item] = Hitter(item, self._floor + 1, self._floor)
        self._push(hitter)

    def forget(self, matches: Callable[[T], bool]) -> None:
        """Drops the items that match, as if they had not been counted."""
        self._hitters = {item: hitter for item, hitter in self._hitters.items() if not matches(item)}
        self._rebuild()

    def top(self, most: int) -> list[Hitter[T]]:
        """The first of them, by count; ties as they came."""
        return sorted(self._hitters.values(), key=_count, reverse=True)[:most]

    def _evict(self) -> float:
        """Takes out one of those with the least count, which is returned."""
        while True:
            count, number, hitter = self._heap[0]
            if count == hitter.count:
                heapq.heappop(self._heap)
                del self._hitters[hitter.item]
                return count
            heapq.heapreplace(self._heap, (hitter.count, number, hitter))

    def _push(self, hitter: Hitter[T]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (hitter.count, self._number, hitter))

    def _rebuild(self) -> None:
        self._heap = []
        for hitter in self._hitters.values():
            self._push(hitter)

    def _halve(self) -> None:
        now = self._clock()
        factor = 0.5 ** ((now - self._halved_at) // self._half_life_s)
        self._halved_at = now
        self.total *= factor
        self._floor *= factor
        for hitter in self._hitters.values():
            hitter.count *= factor
            hitter.error *= factor
        self._rebuild()


def _count(hitter: Hitter[T]) -> float:
    return hitter.count
