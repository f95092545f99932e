"""Breakers as the services make them: on the process' clock, with each change of state in the log."""

import time
from collections.abc import Callable

from common import logs
from common.breaker import CircuitBreaker, State
from common.breaker_settings import BreakerSettings

_log = logs.get_logger("breaker")


def logged(
    name: str, settings: BreakerSettings, kind: str = "all", clock: Callable[[], float] = time.monotonic
) -> CircuitBreaker:
    """The breaker of one callee, for calls of one kind."""

    def changed(before: State, after: State) -> None:
        log = _log.warning if after is State.OPEN else _log.info
        log("a breaker changed", callee=name, kind=kind, before=before.value, after=after.value)

    return CircuitBreaker(name, settings, clock, changed)
