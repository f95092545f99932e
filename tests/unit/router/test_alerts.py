"""Alerts are told once and not all the time, none is forgotten, and each ends; a real receiver hears them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from common.config import RouterSettings
from router.alerts import AFTER_S, AGAIN_AFTER_S, QUIET_S, Alert, Alerts, Status
from router.findings import Condition, Finding, Report
from router.telling import Telling
from tests.support.clock import Clock
from tests.support.eventually import eventually
from tests.support.receiver import receiving

STEP_S = 2.5
BAD, WORSE = Condition.DEGRADED, Condition.UNHEALTHY
_STATES = st.sampled_from([None, *Condition])
_RUNS = st.lists(st.tuples(st.tuples(_STATES, _STATES), st.integers(1, 140)), max_size=12)


def report(*states: Condition | None) -> Report:
    """How things 0, 1 … are; None: there is no such thing."""
    return Report.of(Finding("disk", str(n), state) for n, state in enumerate(states) if state is not None)


@dataclass
class Judge:
    """What one thing's alerts may be, said apart from how they are made."""

    history: list[tuple[float, Condition | None]] = field(default_factory=list)
    fired: list[tuple[float, Condition]] = field(default_factory=list)
    resolved: list[float] = field(default_factory=list)

    def see(self, now: float, state: Condition | None, told: list[Alert]) -> None:
        self.history.append((now, state))
        assert len(told) <= 1
        for alert in told:
            if alert.status is Status.FIRING:
                self._may_fire(now, alert.finding.condition)
                self.fired.append((now, alert.finding.condition))
            else:
                assert self.fired, "over, and never begun"
                assert not self.resolved or self.resolved[-1] < self.fired[-1][0], "over twice"
                assert self.lasted(now, good=True) >= QUIET_S
                self.resolved.append(now)
        # While nothing is known there is nothing to say.
        if state is not Condition.UNKNOWN:
            self._is_not_silent(now)

    def _may_fire(self, now: float, condition: Condition) -> None:
        assert self.history[-1][1] is condition
        assert condition >= BAD
        assert self.lasted(now, good=False) >= AFTER_S
        over_at = self.resolved[-1] if self.resolved else -1.0
        for at, before in self.fired:
            goes_on = at > over_at
            assert not goes_on or now - at >= AGAIN_AFTER_S or before < condition, "told twice within five minutes"

    def _is_not_silent(self, now: float) -> None:
        if self.lasted(now, good=False) >= AFTER_S + AGAIN_AFTER_S:
            assert now - self.fired[-1][0] <= AGAIN_AFTER_S, "it lasts, and nobody hears of it"
        if self.lasted(now, good=False) >= AFTER_S:
            assert self.fired
            assert not self.resolved or self.fired[-1][0] > self.resolved[-1], "it is back, and nobody hears of it"
        if self.lasted(now, good=True) >= QUIET_S and self.fired:
            assert self.resolved
            assert self.resolved[-1] > self.fired[-1][0], "it is over, and nobody hears of it"

    def lasted(self, now: float, *, good: bool) -> float:
        """Seconds that it has been well, or not, without a break; what is unknown is no break of either."""
        since = None
        for at, state in reversed(self.history):
            if state is Condition.UNKNOWN:
                continue
            if (state is None or state is Condition.HEALTHY) is not good:
                break
            since = at
        return now - since if since is not None else -1.0


@given(_RUNS)
def test_whatever_comes_and_goes_is_told_as_promised(runs: list[tuple[tuple[Condition | None, ...], int]]) -> None:
    clock = Clock()
    alerts, judges = Alerts(clock), (Judge(), Judge())
    for states, steps in runs:
        for _ in range(steps):
            told = alerts.observe(report(*states))
            for number, judge in enumerate(judges):
                judge.see(clock(), states[number], [a for a in told if a.finding.subject == str(number)])
            clock.pass_(STEP_S)
    for _ in range(int(QUIET_S / STEP_S) + 2):
        alerts.observe(report())
        clock.pass_(STEP_S)
    assert not alerts._incidents, "it remembers for ever"


def test_what_lasts_is_told_again_after_five_minutes_and_when_it_gets_worse_and_when_it_is_over() -> None:
    clock = Clock()
    alerts, told = Alerts(clock), list[tuple[float, str, str]]()
    for state, seconds in ((BAD, 400), (WORSE, 100), (Condition.HEALTHY, 60)):
        for _ in range(seconds):
            for alert in alerts.observe(report(state)):
                told.append((clock() - 100, alert.status.value, alert.finding.condition.name))
            clock.pass_(1)
    assert told == [
        (AFTER_S, "firing", "DEGRADED"),
        (AFTER_S + AGAIN_AFTER_S, "firing", "DEGRADED"),
        (400.0, "firing", "UNHEALTHY"),
        (500.0 + QUIET_S, "resolved", "UNHEALTHY"),
    ]


def test_what_fails_again_after_it_was_told_to_be_over_is_told_at_once_and_not_five_minutes_later() -> None:
    clock = Clock()
    alerts, told = Alerts(clock), list[tuple[float, str]]()
    for state, seconds in ((BAD, 10), (Condition.HEALTHY, 40), (BAD, 100), (Condition.HEALTHY, 10), (BAD, 40)):
        for _ in range(seconds):
            told += [(clock() - 100, alert.status.value) for alert in alerts.observe(report(state))]
            clock.pass_(1)
    # The second time it comes and goes within what is quiet: it goes on.
    assert told == [(AFTER_S, "firing"), (10 + QUIET_S, "resolved"), (50 + AFTER_S, "firing")]


@asynccontextmanager
async def telling(url: str, timeout_s: float = 5.0) -> AsyncIterator[Telling]:
    settings = RouterSettings(
        catalog_dsn="postgresql://unused",  # type: ignore[arg-type]
        alert_webhook_url=url,  # type: ignore[arg-type]
        alert_timeout_s=timeout_s,
    )
    made = Telling(settings)
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


FULL = Alert(Status.FIRING, Finding("disk", "shard-0", BAD, 0.08, "share", "20.1 GiB free"))


async def test_a_receiver_gets_what_there_is_to_say() -> None:
    async with receiving() as receiver, telling(receiver.url) as teller:
        teller.tell(FULL)
        teller.tell(Alert(Status.RESOLVED, FULL.finding))
        await eventually(lambda: len(receiver.bodies) == 2)
    first, second = receiver.bodies
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "status": "firing",
        "alert": "disk",
        "subject": "shard-0",
        "condition": "degraded",
        "figure": 0.08,
        "unit": "share",
        "why": "20.1 GiB free",
        "router": "127.0.0.1:50051",
    }
    assert second["status"] == "resolved"


async def test_a_receiver_that_fails_is_tried_again_and_one_that_hangs_holds_nobody_up() -> None:
    async with receiving() as receiver, telling(receiver.url, timeout_s=0.2) as teller:
        receiver.status = 503
        teller.tell(FULL)
        await eventually(lambda: receiver.asked == 1)
        receiver.status = 200
        await eventually(lambda: len(receiver.bodies) == 1)
        receiver.silent = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(1_000):
            teller.tell(FULL)
        assert loop.time() - began < 2
        await eventually(lambda: receiver.asked == 3)
        receiver.silent, receiver.drips = False, True
        asked = receiver.asked
        await eventually(lambda: receiver.asked > asked + 1)
        receiver.drips = False
        await eventually(lambda: len(receiver.bodies) > 5, within_s=20)
