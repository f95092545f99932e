"""Reads that ask the same at the same time: one of them goes, and the others wait for what it brings.

What brings it is nobody's own: whoever leaves, the first included, leaves the others waiting, and only when the last
has left is it given up. Each waits for as long as its own deadline is. Who has more time than the first had does not
take a failure from it, which may be for want of time.

In a trace, whoever waits has a span, with a link to that of the one who began it. What is done is in the first one's
trace, which does not end before that does.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from common import tracing
from common.deadline import Deadline
from common.tracing import Span, Trace

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: "asyncio.Task[T]"
    deadline: Deadline
    span: Span
    """That in which it was begun."""
    held: Trace | None
    waiting: int = 0


class SingleFlight(Generic[K, T]):
    """What is under way, by what was asked."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: K, deadline: Deadline, work: Callable[[], Awaitable[T]]) -> tuple[T, bool]:
        """The result of `work`, or of the same work that another had begun; and whether it was this caller's.

        Raises what the work raises.
        """
        while True:
            flight = self._flights.get(key)
            is_own = flight is None
            if flight is None:
                flight = self._begin(key, deadline, work)
            flight.waiting += 1
            try:
                if is_own:
                    return await asyncio.shield(flight.task), True
                with tracing.span("wait for the same read") as span:
                    span.link(flight.span)
                    return await asyncio.shield(flight.task), False
            except asyncio.CancelledError:
                if is_own or _is_cancelled() or not flight.task.cancelled():
                    raise
            except Exception:
                if is_own or deadline.at <= flight.deadline.at:
                    raise
            finally:
                flight.waiting -= 1
                if not flight.waiting and not flight.task.done():
                    # Before it has ended: nobody is to join what is being given up.
                    self._end(key, flight)
                    flight.task.cancel()

    def _begin(self, key: K, deadline: Deadline, work: Callable[[], Awaitable[T]]) -> _Flight[T]:
        span = tracing.current()
        flight = self._flights[key] = _Flight(asyncio.ensure_future(_awaited(work)), deadline, span, span.hold())
        flight.task.add_done_callback(lambda task: self._landed(key, flight, task))
        return flight

    def _landed(self, key: K, flight: _Flight[T], task: "asyncio.Task[T]") -> None:
        self._end(key, flight)
        # Those who waited hear of a failure. When nobody does, the event loop would complain.
        if not task.cancelled():
            task.exception()

    def _end(self, key: K, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
            if flight.held is not None:
                flight.held.release()


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())
