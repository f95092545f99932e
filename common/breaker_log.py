"""Breakers as the services make them: on the process' clock, each change of state in the log, openings counted."""

import time
from collections.abc import Callable

from common import logs
from common.breaker import CircuitBreaker, State
from common.breaker_settings import BreakerSettings
from common.telemetry.registry import BREAKER_OPENED

_log = logs.get_logger("breaker")


def logged(
    name: str, settings: BreakerSettings, kind: str = "all", clock: Callable[[], float] = time.monotonic
) -> CircuitBreaker:
    """The breaker of one callee, for calls of one kind."""

    # From the beginning: of a counter that appears with its first opening, nobody sees the increase.
    opened = BREAKER_OPENED.labels(name, kind)

    def changed(before: State, after: State) -> None:
        if after is State.OPEN:
            opened.inc()
        log = _log.warning if after is State.OPEN else _log.info
        log("a breaker changed", callee=name, kind=kind, before=before.value, after=after.value)

    return CircuitBreaker(name, settings, clock, changed)
