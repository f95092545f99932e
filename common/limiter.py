"""How many calls may be in flight at once, found by watching their latency; what is more is refused at once. Pure.

When a service is saturated, more calls in flight only make each of them slower: the slowdown against a quiet time is
the queue. The limit follows it as in Netflix' concurrency-limits (GradientLimit.java), once in each window of 0.1 s:

    gradient = clamp(tolerance * quiet latency / latency, 0.5, 1)
    limit   += 0.5 * (limit * gradient + sqrt(limit) - limit)

It differs in what it takes for the quiet latency. The least one ever seen is too low where calls differ, and an average
over a long time rises with the overload itself. So each kind of call has its own: the average of calls that shared the
service with few others (`least`, or a quarter of the limit, which is at most what keeps the service busy). When calls
are refused and none have few others, the limit is a quarter for a moment to measure again, every ten seconds and when
it has halved or doubled (after Envoy's adaptive concurrency filter, "Calculating the minRTT", and the ten seconds of
BBR's ProbeRTT, ACM Queue 14:5, 2016).

One limiter guards one resource. In front of several shards, with the latency of all of them, a single slow shard would
shut out the users of the others: give each shard its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from common.errors import ResourceExhausted
from common.limiter_settings import LimiterSettings

OVERLOADED = "OVERLOADED"
"""The reason when a call was refused because too many are in flight."""

_SMOOTHING = 0.5
# Calls of a kind before their average says how long it takes.
_ENOUGH = 10


class Priority(StrEnum):
    """Who goes first when there is not room for all."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Admission:
    """A place under the limit. Give it back with exactly one method; what is reported later is not counted."""

    __slots__ = ("_crowd", "_kind", "_limiter")

    def __init__(self, limiter: "Limiter", kind: str, crowd: int) -> None:
        self._limiter: Limiter | None = limiter
        self._kind = kind
        self._crowd = crowd

    def release(self, latency_s: float, *, dropped: bool = False) -> None:
        """The call ended after `latency_s` seconds. `dropped`: its time was up, or the callee refused it for load."""
        if self._limiter is not None:
            limiter, self._limiter = self._limiter, None
            limiter._released(self._kind, self._crowd, latency_s, dropped)
            limiter.on_room()

    def ignore(self) -> None:
        """The call ended and its latency says nothing, as when its caller went. Harmless after a release."""
        if self._limiter is not None:
            limiter, self._limiter = self._limiter, None
            limiter.in_flight -= 1
            limiter.on_room()


class Limiter:
    """Admits calls to one resource. `kind` names calls that take about as long as each other; keep their number
    small."""

    def __init__(self, clock: Callable[[], float], settings: LimiterSettings | None = None) -> None:
        self.settings = settings or LimiterSettings()
        self.in_flight = 0
        self.patience = 1.0
        """Share of the usual slowdown that is put up with: below 1 under degradation, so that fewer wait in line. A
        share of the limit itself would be grown back, or keep a low limit low."""
        self.batch_share = self.settings.batch_share
        """Share of the limit that batches may fill: less under degradation, though not less than a share of the least
        limit."""
        self.busy_per_s: float | None = None
        """Calls that ended in a second of late; None while there was room to spare, which says not how many could."""
        self.on_room: Callable[[], None] = _nobody_waits
        """Called when a place is given back."""
        self._clock = clock
        self._limit = float(self.settings.initial)
        self._quiet: dict[str, _Quiet] = {}
        self._period = _Period(clock(), self._limit)
        self._window = _Window(clock())
        # While the limit is low for a measurement: until when at most.
        self._probing_until: float | None = None

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        return int(self._limit) if self._probing_until is None else self._few()

    def admit(self, kind: str = "", priority: Priority = Priority.INTERACTIVE) -> Admission:
        """A place for a call now. Raises ResourceExhausted / OVERLOADED, which says when to come back."""
        if not self.has_room(priority):
            raise self.refusal(priority)
        self.in_flight += 1
        return Admission(self, kind, self.in_flight)

    def has_room(self, priority: Priority = Priority.INTERACTIVE) -> bool:
        """Whether a call would be admitted now."""
        if self._probing_until is not None and self._clock() >= self._probing_until:
            self._settle(self._clock())
        return self.in_flight < self._room(priority is Priority.BATCH)

    def refusal(self, priority: Priority = Priority.INTERACTIVE) -> ResourceExhausted:
        """What a call hears for which there is no room. That there was none is remembered."""
        batch = priority is Priority.BATCH
        self._period.refused = True
        self._period.refused_interactive |= not batch
        return ResourceExhausted(
            "too many requests at the moment",
            reason=OVERLOADED,
            retry_after_s=self.settings.batch_retry_after_s if batch else self.settings.retry_after_s,
        )

    def _released(self, kind: str, crowd: int, latency_s: float, dropped: bool) -> None:
        window = self._window
        window.crowd = max(window.crowd, self.in_flight)
        self.in_flight -= 1
        window.calls += 1
        if dropped:
            window.dropped += 1
        else:
            quiet = self._quiet.setdefault(kind, _Quiet())
            # Not how many there are by now: that would pick the short calls out of those that began together.
            if crowd <= self._few():
                quiet.add(latency_s)
                self._period.quiet_calls += 1
            if (expected_s := quiet.expected_s()) is not None:
                window.timed += 1
                window.latency_s += latency_s
                window.expected_s += expected_s
        now = self._clock()
        if window.calls >= self.settings.window_calls and now >= window.began + self.settings.window_s:
            self.busy_per_s = window.calls / (now - window.began) if window.crowd * 2 >= self.limit else None
            if self._probing_until is None:
                self._limit = self._next_limit()
            self._window = _Window(now)
        self._measure_quiet(now)

    def _next_limit(self) -> float:
        window, settings = self._window, self.settings
        # With room to spare latencies say nothing of the limit: an idle service's does not creep up.
        if window.crowd * 2 < self.limit:
            return self._limit
        tolerance = max(1.0, settings.tolerance * self.patience)
        fine_s = max(tolerance * window.expected_s, settings.unnoticed_s * self.patience * window.timed)
        limit = self._towards(fine_s)
        if limit < settings.usual:
            fine_s = max(fine_s, settings.bearable_s * self.patience * window.timed)
            limit = min(self._towards(fine_s), settings.usual)
        return min(max(limit, settings.least), settings.most)

    def _towards(self, fine_s: float) -> float:
        """The next limit when the calls of the window may have taken `fine_s` together."""
        window = self._window
        gradient = fine_s / max(fine_s, window.latency_s) if fine_s else 1.0
        gradient *= 1 - window.dropped / window.calls
        target = self._limit * max(0.5, gradient) + math.sqrt(self._limit)
        return self._limit + _SMOOTHING * (target - self._limit)

    def _room(self, batch: bool) -> float:
        if batch:
            # So few hardly queue, and half of a batch refused is work done twice: degradation leaves them their room.
            return max(self.limit * self.batch_share, self.settings.least * self.settings.batch_share)
        # Where only batches were too many, a measurement needs nobody else to stay out.
        return self.limit if self._period.refused_interactive else int(self._limit)

    def _few(self) -> int:
        """Calls in flight that hardly queue for each other."""
        return max(self.settings.least, int(self._limit / 4))

    def _measure_quiet(self, now: float) -> None:
        """Takes over what was measured in a quiet time, and makes one when it has been busy for long."""
        # What ends first is what was short. Five times as many calls as may run at once even that out.
        enough = self._period.quiet_calls >= max(self.settings.probe_calls, 5 * self._few())
        # A limit that has moved far may have followed a queue, or a service that is slower or quicker by itself now.
        moved = not 0.5 < self._limit / self._period.limit < 2
        over = moved or now >= self._period.began + self.settings.probe_every_s
        if self._probing_until is not None:
            if enough or now >= self._probing_until:
                self._settle(now)
        elif enough:
            if over:
                self._settle(now)
        elif self._period.refused and (over or not any(quiet.known() for quiet in self._quiet.values())):
            self._probing_until = now + self.settings.probe_s

    def _settle(self, now: float) -> None:
        for quiet in self._quiet.values():
            quiet.settle()
        self._probing_until = None
        self._period = _Period(now, self._limit)
        self._window = _Window(now)


def _nobody_waits() -> None:
    """There is no queue."""


@dataclass(slots=True)
class _Quiet:
    """How long one kind of call takes while few others are in flight: the average of the last period."""

    settled_s: float | None = None
    sum_s: float = 0.0
    calls: int = 0

    def add(self, latency_s: float) -> None:
        self.sum_s += latency_s
        self.calls += 1

    def known(self) -> bool:
        return self.settled_s is not None or self.calls >= _ENOUGH

    def expected_s(self) -> float | None:
        """In the first period the average so far."""
        if self.settled_s is None and self.known():
            return self.sum_s / self.calls
        return self.settled_s

    def settle(self) -> None:
        if self.calls >= _ENOUGH:
            self.settled_s, self.sum_s, self.calls = self.sum_s / self.calls, 0.0, 0


@dataclass(slots=True)
class _Period:
    """What happened since the quiet latency was last settled."""

    began: float
    limit: float
    quiet_calls: int = 0
    refused: bool = False
    refused_interactive: bool = False


@dataclass(slots=True)
class _Window:
    """What happened since the limit last changed."""

    began: float
    calls: int = 0
    dropped: int = 0
    # Calls of which it is known how long they should take, and the sums of what they did and should take.
    timed: int = 0
    latency_s: float = 0.0
    expected_s: float = 0.0
    crowd: int = 0
