"""The health monitor: what hangs is cut off and is itself what is found, and holds nothing else up."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from common.errors import Unavailable
from router.findings import Condition, Finding
from router.monitor import Check, Monitor
from tests.support.eventually import eventually


@dataclass
class Thing:
    """Something that is asked how it is."""

    name: str
    error: Exception | None = None
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    stubborn: bool = False
    """Cancelling it does not end it."""
    asked: int = 0
    failed: Condition = Condition.UNHEALTHY
    every_s: float = 0.01
    eager: bool = False
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.answers.set()

    async def ask(self) -> Sequence[Finding]:
        self.asked += 1
        while not self.answers.is_set():
            try:
                await self.answers.wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        if self.error is not None:
            raise self.error
        return [Finding(self.name, "", Condition.HEALTHY, float(self.asked), "n")]

    def check(self) -> Check:
        return Check(
            self.name,
            "",
            self.ask,
            self.every_s,
            cut_off_s=0.2,
            failed=self.failed,
            beside=self.beside,
            eager=lambda: self.eager,
        )


@asynccontextmanager
async def monitoring(*things: Thing) -> AsyncIterator[Monitor]:
    monitor = Monitor(lambda: [thing.check() for thing in things])
    running = asyncio.create_task(monitor.run())
    try:
        yield monitor
    finally:
        for thing in things:
            thing.answers.set()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def found(monitor: Monitor) -> dict[str, tuple[Condition, str]]:
    return {finding.name: (finding.condition, finding.message) for finding in monitor.report().findings}


async def test_what_hangs_is_found_and_nothing_else_waits_for_it() -> None:
    good, bad = Thing("good"), Thing("bad", beside=("figure",))
    bad.answers.clear()
    async with monitoring(good, bad) as monitor:
        await eventually(
            lambda: (
                found(monitor)
                == {
                    "good": (Condition.HEALTHY, ""),
                    "bad": (Condition.UNHEALTHY, "no answer in 0.2 s"),
                    "figure": (Condition.UNKNOWN, "no answer in 0.2 s"),
                }
            )
        )
        assert monitor.report().overall is Condition.UNHEALTHY
        asked = good.asked
        await eventually(lambda: good.asked > asked + 1)
        bad.answers.set()
        await eventually(lambda: found(monitor) == {"good": (Condition.HEALTHY, ""), "bad": (Condition.HEALTHY, "")})


async def test_what_cannot_even_be_cancelled_is_asked_once_and_no_more() -> None:
    stuck = Thing("stuck", stubborn=True)
    stuck.answers.clear()
    async with monitoring(stuck) as monitor:
        await eventually(lambda: found(monitor) == {"stuck": (Condition.UNHEALTHY, "no answer in 0.2 s")})
        before = monitor.report().findings[0].at
        await eventually(lambda: monitor.report().findings[0].at > before)
        assert stuck.asked == 1
        report = await monitor.look()
        assert report.overall is Condition.UNHEALTHY
        assert stuck.asked == 1
        stuck.answers.set()
        await eventually(lambda: found(monitor) == {"stuck": (Condition.HEALTHY, "")})


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (Unavailable("x", reason="REDIS_UNAVAILABLE"), "REDIS_UNAVAILABLE"),
        (ConnectionResetError(), "ConnectionResetError"),
        (TimeoutError(), "TimeoutError"),
        (KeyError("what is in here stays here"), "KeyError"),
    ],
)
async def test_a_failure_is_a_finding_as_bad_as_the_check_says(error: Exception, why: str) -> None:
    async with monitoring(Thing("it", error=error, failed=Condition.DEGRADED)) as monitor:
        await eventually(lambda: found(monitor) == {"it": (Condition.DEGRADED, why)})
        assert monitor.report().overall is Condition.DEGRADED


async def test_a_look_is_newer_than_the_wish_for_it() -> None:
    """Also when the same question was under way, and had been answered already by what it asks."""
    rare = Thing("rare", every_s=3600)
    async with monitoring(rare) as monitor:
        await eventually(lambda: rare.asked == 1)
        assert [finding.figure for finding in (await monitor.look()).findings] == [2]
        looks = await asyncio.gather(monitor.look(), monitor.look())
        assert all(look.findings[0].figure >= 3 for look in looks)  # type: ignore[operator]


async def test_what_somebody_waits_for_is_asked_more_often() -> None:
    rare = Thing("rare", every_s=3600)
    async with monitoring(rare):
        await eventually(lambda: rare.asked == 1)
        rare.eager = True
        await eventually(lambda: rare.asked >= 2, within_s=5)


async def test_what_is_no_more_is_not_found_any_more() -> None:
    things = [Thing("here"), Thing("gone")]
    monitor = Monitor(lambda: [thing.check() for thing in things])
    running = asyncio.create_task(monitor.run())
    await eventually(lambda: set(found(monitor)) == {"here", "gone"})
    things[1].answers.clear()
    del things[1]
    await eventually(lambda: set(found(monitor)) == {"here"})
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
