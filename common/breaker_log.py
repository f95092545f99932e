"""Breakers as the services make them: on the process' clock, each change of state in the log, openings counted; and
their states as metrics."""

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily

from common import logs
from common.breaker import CircuitBreaker, State
from common.breaker_settings import BreakerSettings
from common.telemetry.registry import BREAKER_OPENED

_log = logs.get_logger("breaker")

ALL = "all"
"""The kind of a breaker that is for calls of every kind."""

_VALUES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


def logged(
    name: str, settings: BreakerSettings, kind: str = ALL, clock: Callable[[], float] = time.monotonic
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


def states_of(breakers: Iterable[tuple[CircuitBreaker, str]]) -> GaugeMetricFamily:
    """The states of breakers, each with the kind of calls that it is for, for `/metrics`."""
    states = GaugeMetricFamily(
        "circuit_breaker_state", "0: closed. 1: half-open. 2: open, calls are turned away.", labels=["name", "kind"]
    )
    for breaker, kind in breakers:
        states.add_metric([breaker.name, kind], _VALUES[breaker.state])
    return states
