"""Time that passes only while everybody sleeps: what waits for seconds is tested to the millisecond, on any machine."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec
from unittest import mock

from tests.support.clock import Clock

P = ParamSpec("P")


class _Skipping(selectors.DefaultSelector):
    """What an event loop waits with: instead of waiting for its next timer, it lets the time go by."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            # No timer is left: whoever wakes the loop does so from without.
            return super().select()
        ready = super().select(0)
        if not ready:
            self._clock.pass_(max(0.0, timeout))
        return ready


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Runs a test in an event loop of its own, where sleeping takes no time and working none of the clock's.

    `time.monotonic` is the loop's clock too, unless somebody kept the real one before, as default arguments do. For
    tests of nothing but Python: whatever answers from without takes real time, in which timers would all be over.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        clock = Clock()
        with (
            mock.patch("time.monotonic", clock),
            asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Skipping(clock))) as runner,
        ):
            runner.run(test(*args, **kwargs))

    return run
