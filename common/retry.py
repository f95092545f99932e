"""Whether to try again, and when: retries that help when one call failed and add little when all of them do. Pure.

Two decisions, both of which must say yes. `RetrySettings.delay_before_attempt` looks at the one call; `RetryBudget` at
all calls of this process, so that a callee that is down hears 1.2 times its load, and not 3 times.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from common.breaker import BREAKER_OPEN
from common.errors import MemshardError
from common.limiter import OVERLOADED
from common.window import SlidingCount

# Retryable, though not here: a breaker, a limiter or an operator refused so that the caller knows at once, and may
# wait; an answer that is too large stays so.
_FOR_THE_CALLER = frozenset({BREAKER_OPEN, OVERLOADED, "SHARD_MAINTENANCE", "ANSWER_TOO_LARGE"})
_SLICES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    """When one call is tried again. Raises ValueError for what cannot work."""

    attempts: int = 3
    """Attempts in all. At most 3, as in "Site Reliability Engineering" (O'Reilly 2016), chapter 21."""

    base_s: float = 0.05
    """Upper end, in seconds, of the wait before the second attempt; doubled with each that follows."""

    cap_s: float = 0.5
    """Upper end of any wait in seconds, unless the error says how long to wait."""

    least_attempt_s: float = 0.005
    """Seconds that must be left for an attempt. Calls take a few milliseconds; with less it is only load."""

    longest_wait_s: float = 2.0
    """Longest wait, in seconds, that an error may ask for. Beyond, the caller gets the error and waits by itself, since
    requests that sleep here hold memory and their place under the limits."""

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 10 or not 0 < self.base_s <= self.cap_s or self.least_attempt_s < 0:
            raise ValueError("retries need 1 to 10 attempts, and waits above 0 that grow up to their cap")

    def delay_before_attempt(
        self,
        attempt: int,
        error: BaseException,
        remaining_s: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> float | None:
        """Seconds to wait before attempt number `attempt` (2 is the first retry); None when there shall be none.

        `error` is how the attempt before ended, `remaining_s` the time until the caller's deadline. The wait is
        uniform(0, min(cap, base * 2 ** retries)), "full jitter" (M. Brooker, "Exponential Backoff And Jitter", AWS
        Architecture Blog, 2015), added to what the error asks for, so that those who were told the same do not come
        back together. It ends before the deadline, with time for the attempt.
        """
        if not 2 <= attempt <= self.attempts or not isinstance(error, MemshardError):
            return None
        if not error.retryable or error.reason in _FOR_THE_CALLER:
            return None
        asked_s = max(0.0, error.retry_after_s or 0.0)
        room_s = remaining_s - self.least_attempt_s - asked_s
        if asked_s > self.longest_wait_s or room_s < 0:
            return None
        return asked_s + uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** (attempt - 2), room_s))


class RetryBudget:
    """How many retries a process may add to its requests: a share of them, and a few each second for quiet times.

    Whenever a retry is allowed, it and those of the `window_s` seconds before are at most `share` of the requests in
    that time + `per_s * window_s`. So an outage that begins after a busy time finds the retries of
    `window_s` seconds saved up, and no more. The numbers, and the forgetting, are Finagle's (twitter/finagle,
    RetryBudget.scala). Its leaky bucket lets go of retries and of the requests that paid for them at the same time,
    within a slice; here retries are remembered for one slice longer, which makes the bound exact.
    """

    def __init__(
        self, clock: Callable[[], float], *, share: float = 0.2, per_s: float = 10.0, window_s: float = 10.0
    ) -> None:
        self._share = share
        self._reserve = per_s * window_s
        slice_s = window_s / _SLICES
        self._requests = SlidingCount(slice_s, _SLICES, clock)
        self._retries = SlidingCount(slice_s, _SLICES + 1, clock)

    def deposit(self) -> None:
        """A request came in. Its retries are none."""
        self._requests.add()

    def withdraw(self) -> bool:
        """Takes leave for one retry, if there is any left. Ask last, when the retry is otherwise decided."""
        if self.balance() < 1:
            return False
        self._retries.add()
        return True

    def balance(self) -> float:
        """How many retries there may be at once now."""
        return self._share * self._requests.total() + self._reserve - self._retries.total()
