"""The health monitor: makes each check again and again, cuts off what hangs, and keeps what was found last."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from common import logs
from common.errors import MemshardError
from router.findings import Condition, Finding, Report

_log = logs.get_logger("health")

_TICK_S = 0.25
# Between two askings when something waits to hear that all is well.
_EAGER_S = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One question, and how often it is asked."""

    name: str
    subject: str
    ask: Callable[[], Awaitable[Sequence[Finding]]]
    """Raises what is itself the finding: MemshardError, OSError."""
    every_s: float
    cut_off_s: float
    """Seconds after which no answer is the answer."""
    failed: Condition = Condition.UNHEALTHY
    """What it means when there is none."""
    beside: tuple[str, ...] = ()
    """Names of what else it finds, of which nothing is known without an answer."""
    eager: Callable[[], bool] = lambda: False
    """Whether something waits to hear that all is well, so that it is asked more often."""

    @property
    def key(self) -> tuple[str, str]:
        """What it asks about."""
        return self.name, self.subject


@dataclass(slots=True)
class _Course:
    """A check's last findings, and the asking that is under way."""

    findings: tuple[Finding, ...] = ()
    began: float = float("-inf")
    asking: "asyncio.Task[None] | None" = None
    hanging: "asyncio.Future[Sequence[Finding]] | None" = None
    """What was cut off, and has not ended in spite of it."""

    @property
    def is_under_way(self) -> bool:
        return self.asking is not None and not self.asking.done()


class Monitor:
    """`checks` gives those of this moment: they come and go with the topology. `heard` hears of all after each turn."""

    def __init__(
        self, checks: Callable[[], Sequence[Check]], heard: Callable[[Report], None] = lambda _report: None
    ) -> None:
        self._checks = checks
        self._heard = heard
        self._courses: dict[tuple[str, str], _Course] = {}

    def report(self) -> Report:
        """What was found last."""
        return Report.of(finding for course in self._courses.values() for finding in course.findings)

    @property
    def is_complete(self) -> bool:
        """Whether every check has found something, as is soon after the start."""
        return all(self._course(check).findings for check in self._checks())

    async def look(self) -> Report:
        """Makes every check anew, and waits for all of them: for twice as long as the slowest is given, at most."""
        await asyncio.gather(*map(self._anew, self._checks()))
        return self.report()

    async def run(self) -> None:
        """Makes each check when it is due, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                checks = self._checks()
                self._drop_others({check.key for check in checks})
                for check in checks:
                    wait_s = min(check.every_s, _EAGER_S) if check.eager() else check.every_s
                    if loop.time() - self._course(check).began >= wait_s:
                        self._begin(check)
                await asyncio.sleep(_TICK_S)
                self._heard(self.report())
        finally:
            self._drop_others(set())

    def _course(self, check: Check) -> _Course:
        return self._courses.setdefault(check.key, _Course())

    def _drop_others(self, current: set[tuple[str, str]]) -> None:
        for key in self._courses.keys() - current:
            course = self._courses.pop(key)
            for task in (course.asking, course.hanging):
                if task is not None:
                    task.cancel()

    def _begin(self, check: Check) -> "asyncio.Task[None]":
        """Asks, unless that is under way."""
        course = self._course(check)
        if course.asking is None or course.asking.done():
            course.began = asyncio.get_running_loop().time()
            course.asking = asyncio.create_task(self._ask(check, course))
        return course.asking

    async def _anew(self, check: Check) -> None:
        course = self._course(check)
        if course.asking is not None and course.is_under_way:
            # It may have been answered before what the caller wants to see.
            await asyncio.wait([course.asking])
        await asyncio.wait([self._begin(check)])

    async def _ask(self, check: Check, course: _Course) -> None:
        if course.hanging is not None and not course.hanging.done():
            # To ask once more would only leave another one hanging.
            _keep(course, _silent(check))
            return
        asked = asyncio.ensure_future(check.ask())
        try:
            await asyncio.wait([asked], timeout=check.cut_off_s)
        finally:
            if not asked.done():
                asked.cancel()
                asked.add_done_callback(_let_go)
                course.hanging = asked
        _keep(course, _outcome(check, asked) if asked.done() else _silent(check))


def _let_go(cut_off: "asyncio.Future[Sequence[Finding]]") -> None:
    """Nobody asks any more how it ended."""
    if not cut_off.cancelled():
        cut_off.exception()


def _keep(course: _Course, findings: Sequence[Finding]) -> None:
    before = {finding.key: finding.condition for finding in course.findings}
    now = time.time()
    course.findings = tuple(replace(finding, at=now) for finding in findings)
    for finding in findings:
        # What is not known is no news.
        old = max(before.get(finding.key, Condition.HEALTHY), Condition.HEALTHY)
        if old != max(finding.condition, Condition.HEALTHY):
            log = _log.warning if finding.condition > old else _log.info
            log(
                "a check changed",
                check=finding.name,
                subject=finding.subject,
                condition=finding.condition.name.lower(),
                why=finding.message,
            )


def _outcome(check: Check, asked: "asyncio.Future[Sequence[Finding]]") -> Sequence[Finding]:
    if asked.cancelled():
        return _without_answer(check, "was interrupted")
    error = asked.exception()
    if error is None:
        return asked.result()
    if isinstance(error, MemshardError):
        return _without_answer(check, error.reason)
    if not isinstance(error, OSError):  # TimeoutError is one.
        _log.error("a check failed by a bug", check=check.name, **logs.describe_bug(error))
    return _without_answer(check, type(error).__name__)


def _silent(check: Check) -> Sequence[Finding]:
    return _without_answer(check, f"no answer in {check.cut_off_s:g} s")


def _without_answer(check: Check, why: str) -> Sequence[Finding]:
    failed = Finding(check.name, check.subject, check.failed, message=why)
    return [failed, *(Finding(name, check.subject, Condition.UNKNOWN, message=why) for name in check.beside)]
