"""A limit for all calls to a service: who is too many hears so at once, before the request is even parsed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.errors import DeadlineExceeded, MemshardError, ResourceExhausted, Unavailable
from common.limiter import Limiter, Priority


@dataclass(frozen=True, slots=True)
class Admission:
    """Which calls of a service pass its limit, and in which order of importance."""

    batches: frozenset[str] = frozenset()
    """Names of rpcs that make way for the others."""
    free: frozenset[str] = frozenset()
    """Names of rpcs that are always let in, such as those that ask how the service is."""
    clock: Callable[[], float] = time.monotonic
    limiter: Limiter = field(default_factory=lambda: Limiter(time.monotonic))

    @contextmanager
    def of(self, rpc: str) -> Iterator[None]:
        """`with` it: one call. Raises ResourceExhausted / OVERLOADED when there are too many."""
        if rpc in self.free:
            yield
            return
        place = self.limiter.admit(rpc, Priority.BATCH if rpc in self.batches else Priority.INTERACTIVE)
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
