"""What the alert of a breaker goes by (deploy/monitoring/prometheus/rules-alerts.yml, MemshardBreakerOpen)."""

from itertools import pairwise

from common.breaker import Permit, State
from common.breaker_log import logged
from common.breaker_settings import SHARD
from common.telemetry.registry import REGISTRY
from router.guard import Guard, Kind


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(name: str) -> float:
    value = REGISTRY.get_sample_value("memory_breaker_opened_total", {"name": name, "kind": "search"})
    assert value is not None, "a counter that is not there from the beginning hides its first increase"
    return value


def test_openings_are_counted_and_nothing_else() -> None:
    breaker = logged("counted", SHARD, "search", _Clock())
    assert opened("counted") == 0
    for _ in range(SHARD.consecutive_failures):
        assert opened("counted") == 0
        breaker.admit().failure()
    assert opened("counted") == 1
    breaker.probe_succeeded()
    for _ in range(SHARD.probes):
        breaker.admit().success(0.0)
    assert breaker.state is State.CLOSED
    assert opened("counted") == 1


def test_what_answers_health_checks_and_hangs_in_calls_opens_its_breaker_in_every_minute() -> None:
    clock = _Clock()
    guard = Guard("hangs", "hangs", clock)
    breaker = guard.breakers[Kind.SEARCH]
    waiting: list[tuple[float, Permit]] = []
    open_since, longest_s = None, 0.0
    openings = []
    # A call each second, given up after two; a health check in each quarter of one.
    for quarter in range(4 * 600):
        clock.now = quarter / 4
        if guard.troubled:
            guard.heard()
        while waiting and waiting[0][0] <= clock.now:
            waiting.pop(0)[1].timeout(2.0)
        if quarter % 4 == 0 and not guard.refuses(Kind.SEARCH):
            waiting.append((clock.now + 2.0, breaker.admit()))
        open_since = (clock.now if open_since is None else open_since) if breaker.state is State.OPEN else None
        longest_s = max(longest_s, 0.0 if open_since is None else clock.now - open_since)
        if quarter % (4 * 60) == 0:
            openings.append(opened("hangs"))
    # Its state alone would page nobody: at one of two looks it is half-open.
    assert longest_s < 2
    assert all(later > earlier for earlier, later in pairwise(openings)), openings
