"""A cache bounded in bytes and in time: what was used longest ago goes first. Pure."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Bytes that an entry takes besides what is in it: key, tuples, places in two tables, numbers. For memories tracemalloc
# counts 693; the rest is what an allocator leaves unused.
_OVERHEAD_BYTES = 950
# An entry that takes a larger share would push out too many others.
_LARGEST_SHARE = 1 / 8


class _Slot(NamedTuple, Generic[V]):
    value: V
    until: float
    size_bytes: int


class BoundedCache(Generic[K, V]):
    """Values by key. `max_bytes` 0: none."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self._clock = clock
        self._slots: OrderedDict[K, _Slot[V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, key: K) -> V | None:
        """The value of a key, which is used hereby; None when there is none, or it is too old."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        if slot.until <= self._clock():
            self.pop(key)
            return None
        self._slots.move_to_end(key)
        return slot.value

    def put(self, key: K, value: V, *, size_bytes: int, ttl_s: float) -> None:
        """Keeps a value of so many bytes for at most `ttl_s`, instead of the one before; or not, if it is too large."""
        self.pop(key)
        size_bytes += _OVERHEAD_BYTES
        if ttl_s <= 0 or size_bytes > self.max_bytes * _LARGEST_SHARE:
            return
        self._slots[key] = _Slot(value, self._clock() + ttl_s, size_bytes)
        self.size_bytes += size_bytes
        while self.size_bytes > self.max_bytes:
            _, oldest = self._slots.popitem(last=False)
            self.size_bytes -= oldest.size_bytes

    def pop(self, key: K) -> None:
        """Drops the value of a key, if there is one."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self.size_bytes -= slot.size_bytes

    def pop_where(self, condition: Callable[[K, V], bool]) -> None:
        """Drops all that meet a condition; goes through everything."""
        for key in [key for key, slot in self._slots.items() if condition(key, slot.value)]:
            self.pop(key)

    def clear(self) -> None:
        """Drops everything."""
        self._slots.clear()
        self.size_bytes = 0
