"""A short queue in front of a limit: a burst waits for its turn, an overload does not.

Who finds no room waits for up to 100 ms, unless so many wait already that its turn would come later, by the rate at
which calls end. Once one has been refused, it is no burst, and waiting would help nobody: whoever finds no room hears
so at once, until for a second everybody found some. The 100 ms are those of B. Maurer, "Fail at Scale" (ACM Queue 13:8,
2015, section "Controlled delay"), who goes on with a wait of 5 ms; but callers are to hear of a refusal within 20 ms,
and what keeps the servers busy is in flight.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from common.errors import ResourceExhausted
from common.limiter import Limiter, Priority

_BURST_S = 0.1
_OVERLOAD_S = 1.0
# Longest queue: with a millisecond for each it is a quarter of a second's work, which is no burst any more.
_LONGEST = 256


class WaitingRoom:
    """The queue of one limiter: in order of arrival, and batches after all others."""

    def __init__(self, limiter: Limiter, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock
        self._waiting: dict[Priority, deque[asyncio.Future[None]]] = {priority: deque() for priority in Priority}
        self._refused_at = dict.fromkeys(Priority, -math.inf)
        limiter.on_room = self._wake

    async def room(self, priority: Priority) -> None:
        """Returns when the limiter has room for one more; its `admit` is to be called at once, before anything else.

        Raises ResourceExhausted / OVERLOADED when there was none in time.
        """
        waiting = self._waiting[priority]
        if not waiting and self._limiter.has_room(priority):
            return
        now = self._clock()
        if len(waiting) >= self._longest() or now - self._refused_at[priority] < _OVERLOAD_S:
            raise self._refusal(priority)
        until = now + _BURST_S
        join = waiting.append
        while True:
            turn = asyncio.get_running_loop().create_future()
            join(turn)
            try:
                async with asyncio.timeout(max(0.0, until - self._clock())):
                    await turn
            except BaseException as error:
                if turn in waiting:
                    waiting.remove(turn)
                else:
                    self._wake()  # It was this one's turn, which is the next one's now.
                if isinstance(error, TimeoutError):
                    raise self._refusal(priority) from None
                raise
            if self._limiter.has_room(priority):
                # There may be room for the next as well.
                self._wake()
                return
            # Who is called too early goes back to the head, not to the end.
            join = waiting.appendleft

    def _longest(self) -> float:
        """How many may wait, of whom the last has its turn in time."""
        per_s = self._limiter.busy_per_s
        return _LONGEST if per_s is None else min(_LONGEST, per_s * _BURST_S)

    def _refusal(self, priority: Priority) -> ResourceExhausted:
        self._refused_at[priority] = self._clock()
        return self._limiter.refusal(priority)

    def _wake(self) -> None:
        for priority, waiting in self._waiting.items():
            while waiting and self._limiter.has_room(priority):
                turn = waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
