"""A limit for all calls to a service: who is too many hears so at once, before the request is even parsed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import DeadlineExceeded, MemshardError, ResourceExhausted, Unavailable
from common.limiter import Limiter, Priority
from common.limiter_settings import SERVER
from common.telemetry.registry import SHED
from common.waiting_room import WaitingRoom

# Neither at the entrance of a router nor by a router before a server, but by the server itself.
_SHED = SHED.labels("admission")


class Admission:
    """Which calls of a service pass its limit, and in which order of importance.

    `batches` are the names of rpcs that make way for the others, `free` of those that are always let in, such as those
    that ask how the service is.
    """

    def __init__(
        self,
        batches: frozenset[str] = frozenset(),
        free: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batches = batches
        self.free = free
        self.clock = clock
        self.limiter = Limiter(clock, SERVER)
        self._queue = WaitingRoom(self.limiter, clock)

    async def room(self, rpc: str) -> None:
        """Waits for a place, for a short time; `of` is to be entered at once. Raises ResourceExhausted / OVERLOADED."""
        if rpc not in self.free:
            try:
                await self._queue.room(self._priority(rpc))
            except ResourceExhausted:
                _SHED.inc()
                raise

    @contextmanager
    def of(self, rpc: str) -> Iterator[None]:
        """`with` it: one call. Raises ResourceExhausted / OVERLOADED when there are too many."""
        if rpc in self.free:
            yield
            return
        try:
            place = self.limiter.admit(rpc, self._priority(rpc))
        except ResourceExhausted:
            _SHED.inc()
            raise
        began = self.clock()
        try:
            yield
            place.release(self.clock() - began)
        except (DeadlineExceeded, TimeoutError, ResourceExhausted):
            place.release(self.clock() - began, dropped=True)
            raise
        except Unavailable:
            raise  # Of something that is away the time says nothing.
        except MemshardError:
            place.release(self.clock() - began)
            raise
        finally:
            place.ignore()

    def _priority(self, rpc: str) -> Priority:
        return Priority.BATCH if rpc in self.batches else Priority.INTERACTIVE
