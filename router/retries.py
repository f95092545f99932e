"""Trying again: what failed for a cause that may be over by now, within the caller's time and the router's budget.

Only the router retries; shards don't. Every write may be tried again, since a repetition has no second effect: a store
by its id and digest, everything else by its request id, which the router makes where the caller gave none.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common import tracing
from common.deadline import Deadline
from common.errors import (
    DeadlineExceeded,
    MemshardError,
    OutcomeUnknown,
    ReadOnly,
    ResourceExhausted,
    Unavailable,
    WrongShard,
)
from common.retry import RetryBudget, RetrySettings
from common.telemetry.registry import RETRIES, RETRIES_REFUSED

T = TypeVar("T")

# Twice what calls keep for the way back (router/shards.py).
_KEPT_SHARE = 0.1
_MOST_KEPT_S = 0.5

# What says nothing of an earlier attempt of the same write, whose answer did not come.
_UNDECIDED = (Unavailable, DeadlineExceeded, ResourceExhausted, ReadOnly, WrongShard)


class Retries:
    """Runs calls to shards, and runs them again. One for the process, as it keeps the budget."""

    def __init__(self, settings: RetrySettings | None = None, budget: RetryBudget | None = None) -> None:
        self.budget = budget or RetryBudget(time.monotonic)
        self._settings = settings or RetrySettings()

    async def run(self, attempt: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
        """The result of the first attempt that succeeds.

        Raises what the last attempt raised; OutcomeUnknown when an earlier one left a write in doubt, and the last one
        did not settle it.
        """
        self.budget.deposit()
        # What is kept of the time is for the way back, with what other shards have said; not for one more attempt.
        last = deadline.less(min(_KEPT_SHARE * deadline.remaining_s(), _MOST_KEPT_S))
        in_doubt: OutcomeUnknown | None = None
        number = 1
        while True:
            try:
                return await attempt()
            except MemshardError as error:
                in_doubt = error if isinstance(error, OutcomeUnknown) else in_doubt
                number, why = number + 1, error.reason
                delay_s = self._settings.delay_before_attempt(number, error, last.remaining_s())
                if delay_s is None or not self.withdraw():
                    if in_doubt not in (None, error) and isinstance(error, _UNDECIDED):
                        raise in_doubt from error
                    raise
            tracing.current().event(
                "retry", {"memshard.attempt": number, "error.type": why, "memshard.retry.delay_ms": delay_s * 1000}
            )
            await asyncio.sleep(delay_s)

    def withdraw(self) -> bool:
        """Takes leave for one attempt more, if the budget has any left."""
        allowed = self.budget.withdraw()
        (RETRIES if allowed else RETRIES_REFUSED).inc()
        return allowed
