"""The way in: when this process itself has too much to do, requests are refused before they cost anything."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile

from common.errors import ResourceExhausted
from common.limiter import OVERLOADED, Priority
from common.shedder import Shedder
from common.telemetry.registry import SHED
from common.window import SlidingCount

_SHED = SHED.labels("entrance")

_BATCHES = frozenset({"BatchStoreMemories", "EraseUser"})

_LOOK_S = 0.1
_LOOKS_AT_ONCE = 5
# Seconds after which a call is taken to wait for somebody else.
_YOUNG_S = 0.25
# Seconds after which whoever was refused may come back.
_RETRY_AFTER_S = {Priority.INTERACTIVE: 1.0, Priority.BATCH: 5.0}


class Entrance:
    """Lets calls of MemoryService in. `run` watches how late the event loop is."""

    def __init__(
        self, shed: SlidingCount, shedder: Shedder | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`shed` counts the requests that are refused."""
        self.shed = shed
        self.shed_ever = 0
        """Requests that were refused since the start."""
        self.shedder = shedder or Shedder()
        self._clock = clock
        # In the order in which they began.
        self._begun: dict[object, float] = {}

    async def room(self, rpc: str) -> None:
        """Raises ResourceExhausted / OVERLOADED when this process has too much to do."""
        priority = Priority.BATCH if rpc in _BATCHES else Priority.INTERACTIVE
        if not self.shedder.admits(priority):
            self.shed.add()
            self.shed_ever += 1
            _SHED.inc()
            raise ResourceExhausted(
                "too many requests at the moment", reason=OVERLOADED, retry_after_s=_RETRY_AFTER_S[priority]
            )

    @contextmanager
    def of(self, rpc: str) -> Iterator[None]:
        """Counts a call as long as it is at work."""
        call = object()
        self._begun[call] = self._clock()
        try:
            yield
        finally:
            del self._begun[call]

    async def run(self) -> None:
        """Looks ten times a second, until cancelled, how much later than asked for this is woken."""
        loop = asyncio.get_running_loop()
        pause_s = _LOOK_S / _LOOKS_AT_ONCE
        while True:
            late_s = 0.0
            for _ in range(_LOOKS_AT_ONCE):
                due = loop.time() + pause_s
                await asyncio.sleep(pause_s)
                late_s += max(0.0, loop.time() - due)
            self.shedder.at_work = self._young()
            self.shedder.observe(late_s / _LOOKS_AT_ONCE)

    def _young(self) -> int:
        since = self._clock() - _YOUNG_S
        return sum(1 for _ in takewhile(lambda began: began >= since, reversed(self._begun.values())))
