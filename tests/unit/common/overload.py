"""A discrete-event simulation of a service behind a limiter, with callers who do not wait for each other."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from common.errors import ResourceExhausted
from common.limiter import Admission, Limiter, Priority
from tests.support.clock import Clock


@dataclass(frozen=True)
class Call:
    """One call: when it came, whose it was, how long it took in seconds; None where it was refused."""

    at: float
    priority: Priority
    latency_s: float | None


@dataclass
class Run:
    """What came of a simulation."""

    calls: list[Call] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)

    def within(self, begin: float, end: float, priority: Priority | None = None) -> "Run":
        """The part of it from `begin` to `end` seconds, of one priority or of all."""
        return Run(
            [call for call in self.calls if begin <= call.at < end and priority in (None, call.priority)],
            [(at, limit) for at, limit in self.limits if begin <= at < end],
        )

    def latencies_s(self) -> list[float]:
        """Of the answered, ascending."""
        return sorted(call.latency_s for call in self.calls if call.latency_s is not None)

    def answered(self) -> int:
        return len(self.latencies_s())

    def refused(self) -> int:
        return len(self.calls) - self.answered()

    def p99_s(self) -> float:
        latencies = self.latencies_s()
        return latencies[int(len(latencies) * 0.99)]


@dataclass
class Service:
    """Works on `capacity` calls at a time for `work_s()` seconds each; the others wait in line, and all that is
    admitted waits for as long as it takes."""

    limiter: Limiter
    clock: Clock
    capacity: int
    work_s: Callable[[], float]

    def run(self, arrivals: Iterator[tuple[float, Priority]], until: float) -> Run:
        """Serves the arrivals, which are ascending, until `until` seconds."""
        run = Run()
        order = itertools.count()
        events: list[tuple[float, int, Admission | None, Priority, float]] = []
        line: deque[tuple[Admission, Priority, float]] = deque()
        working = 0

        def begin(admission: Admission, priority: Priority, came: float) -> None:
            heapq.heappush(events, (self.clock.now + self.work_s(), next(order), admission, priority, came))

        def next_arrival() -> None:
            came, priority = next(arrivals)
            heapq.heappush(events, (came, next(order), None, priority, came))

        next_arrival()
        while events[0][0] < until:
            self.clock.now, _, admission, priority, came = heapq.heappop(events)
            if admission is None:
                next_arrival()
                run.limits.append((self.clock.now, self.limiter.limit))
                try:
                    admission = self.limiter.admit(priority=priority)
                except ResourceExhausted:
                    run.calls.append(Call(self.clock.now, priority, None))
                    continue
                if working < self.capacity:
                    working += 1
                    begin(admission, priority, came)
                else:
                    line.append((admission, priority, came))
            else:
                admission.release(self.clock.now - came)
                run.calls.append(Call(self.clock.now, priority, self.clock.now - came))
                if line:
                    begin(*line.popleft())
                else:
                    working -= 1
        return run


def arrivals(
    per_s: Callable[[float], float], rng: random.Random, batch_share: float = 0.0
) -> Iterator[tuple[float, Priority]]:
    """Calls that come at random, `per_s(now)` of them a second, a share of them batches."""
    now = 0.0
    while True:
        now += rng.expovariate(per_s(now))
        yield now, Priority.BATCH if rng.random() < batch_share else Priority.INTERACTIVE
