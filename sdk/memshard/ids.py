"""UUIDv7 ids (RFC 9562): their order is the order of making, so that a user's rows are written side by side.

An id is made before the first attempt of a write, and every retry carries it: that is what makes retries harmless.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from typing import Final

# RFC 9562, section 6.2, method 1: a counter of 42 bits follows the 48 bits of milliseconds, 32 random bits end the id.
_COUNTER_BITS: Final = 42
_RANDOM_BITS: Final = 32


class IdGenerator:
    """Makes UUIDv7s that grow strictly, whatever the clock does. Safe to share between threads.

    Args:
        clock_ns: nanoseconds since the Unix epoch.
        random_bits: that many random bits, as an int.
    """

    def __init__(
        self,
        clock_ns: Callable[[], int] = time.time_ns,
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self._clock_ns = clock_ns
        self._random_bits = random_bits
        self._lock = threading.Lock()
        self._last_ms = -1
        self._counter = 0

    def new_id(self) -> str:
        """A new id, greater than all made before, in its canonical text form of 36 characters."""
        now_ms = self._clock_ns() // 1_000_000
        with self._lock:
            if now_ms > self._last_ms:
                self._begin(now_ms)
            else:  # Within one millisecond, or the clock was set back: count on from the last id.
                self._counter += 1
                if self._counter >> _COUNTER_BITS:
                    self._begin(self._last_ms + 1)
            ms, counter = self._last_ms, self._counter
        value = (ms & ((1 << 48) - 1)) << 80
        value |= 0x7 << 76  # The version.
        value |= (counter >> 30) << 64
        value |= 0b10 << 62  # The variant.
        value |= (counter & ((1 << 30) - 1)) << _RANDOM_BITS
        value |= self._random_bits(_RANDOM_BITS)
        return str(uuid.UUID(int=value))

    def _begin(self, ms: int) -> None:
        self._last_ms = ms
        # The top bit starts at zero, so that a millisecond has room for 2^41 ids whatever the seed.
        self._counter = self._random_bits(_COUNTER_BITS - 1)


_generator = IdGenerator()


def new_id() -> str:
    """A new UUIDv7, greater than all that this process made before. Safe in threads and after a fork."""
    return _generator.new_id()


def _after_fork() -> None:
    # A forked child must neither count on from its parent's ids nor wait for a lock that a lost thread holds.
    global _generator  # noqa: PLW0603 - The process has one generator, and the child needs another.
    _generator = IdGenerator()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
