"""A count over the last seconds in bounded memory: what breakers, budgets and estimates look back on. Pure."""

from collections.abc import Callable


class SlidingCount:
    """How many of something there were lately, kept in `slices` slots of `slice_s` seconds each.

    Time is cut at multiples of `slice_s`, and the slice that is being filled is one of them. So the count covers the
    last `(slices - 1) * slice_s` to `slices * slice_s` seconds: never more than the latter. Whoever must not miss
    anything of a period asks for one slice more than the period has. The slots are those of Hystrix' rolling
    number (github.com/Netflix/Hystrix, "How it Works", ten of them by default).
    """

    def __init__(self, slice_s: float, slices: int, clock: Callable[[], float]) -> None:
        if slice_s <= 0 or slices < 1:
            raise ValueError("a window needs at least one slice, and a slice some time")
        self._slice_s = slice_s
        self._clock = clock
        self._slots = [0] * slices
        self._newest = self._number()
        self._ends_at = self._end()
        self._total = 0

    def add(self, amount: int = 1) -> None:
        """Counts `amount` as of now."""
        if self._clock() >= self._ends_at:
            self._roll()
        self._slots[self._newest % len(self._slots)] += amount
        self._total += amount

    def total(self) -> int:
        """What was counted in the window."""
        if self._clock() >= self._ends_at:
            self._roll()
        return self._total

    def clear(self) -> None:
        """Forgets everything."""
        self._slots = [0] * len(self._slots)
        self._total = 0

    def _number(self) -> int:
        return int(self._clock() // self._slice_s)

    def _end(self) -> float:
        """When the slice that is being filled ends."""
        return (self._newest + 1) * self._slice_s

    def _roll(self) -> None:
        now = self._number()
        if now <= self._newest:
            return
        if now - self._newest >= len(self._slots):
            self.clear()
        else:
            for number in range(self._newest + 1, now + 1):
                slot = number % len(self._slots)
                self._total -= self._slots[slot]
                self._slots[slot] = 0
        self._newest = now
        self._ends_at = self._end()
