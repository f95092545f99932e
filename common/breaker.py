"""A circuit breaker: whoever does not answer is asked no more, until a few probes show that it does again. Pure.

    closed ──── too many failures ──▶ open ──── 1, 2, 4 … s, or a health check that succeeds ──▶ half-open
      ▲                                ▲                                                            │ │
      │                                └──────────────────── a probe failed ────────────────────────┘ │
      └───────────────────────────────────── enough probes succeeded ─────────────────────────────────┘

The names and the sliding window with its least number of calls are those of resilience4j ("CircuitBreaker", section
"Failure rate and slow call rate thresholds"); ten slices and 20 calls are Hystrix' defaults
(metrics.rollingStats.numBuckets, circuitBreaker.requestVolumeThreshold). For one event loop: nothing here locks.
"""

from collections.abc import Callable
from enum import StrEnum

from common.breaker_settings import BreakerSettings
from common.errors import DeadlineExceeded, MemshardError, Unavailable
from common.window import SlidingCount

BREAKER_OPEN = "BREAKER_OPEN"
"""The reason when a breaker refused, and nobody was asked."""

UNDECIDED_S = 0.1
"""Seconds that a probe may take until nobody waits for it: as long as bursts wait for a place, too
(`common.waiting_room`)."""

# Unavailable for a cause in the one request or slot, by answer of a callee that is well, or before it was asked.
_NOT_OF_THE_CALLEE = frozenset(
    {BREAKER_OPEN, "SLOT_BUSY", "TOPOLOGY_CHANGING", "SHARD_MAINTENANCE", "REPLICA_BEHIND", "EMBEDDER_REFUSED"}
)
_SLICES = 10


class State(StrEnum):
    """What a breaker does with calls."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


def speaks_of_callee(error: MemshardError) -> bool:
    """Whether an error is a failure of whoever was called, rather than of the request or of the caller.

    INTERNAL is not one: it is a bug that one request can set off, and one user's request must not cut off the others.
    RESOURCE_EXHAUSTED is none either: a callee that sheds load is well, and to open on it makes of less, nothing.
    """
    return isinstance(error, Unavailable | DeadlineExceeded) and error.reason not in _NOT_OF_THE_CALLEE


class Permit:
    """Leave to make one call. Report how it went with exactly one method; what is reported later is not counted."""

    __slots__ = ("_breaker", "_generation", "_reported", "_round")

    def __init__(self, breaker: "CircuitBreaker", generation: int, round_: int) -> None:
        self._breaker = breaker
        self._generation = generation
        self._round = round_
        self._reported = False

    def success(self, duration_s: float) -> None:
        """The callee answered after `duration_s` seconds, be it with a refusal that the request deserved."""
        self._report(failed=duration_s >= self._breaker.settings.slow_call_s)

    def failure(self) -> None:
        """The callee failed, as `speaks_of_callee` says."""
        self._report(failed=True)

    def timeout(self, waited_s: float) -> None:
        """The time was up after `waited_s` seconds: a failure if those were a fair chance, else nothing."""
        self._report(failed=True if waited_s >= self._breaker.settings.fair_timeout_s else None)

    def ignore(self) -> None:
        """The call says nothing of the callee, such as one that its caller cancelled. Harmless after a report."""
        self._report(failed=None)

    def _report(self, failed: bool | None) -> None:
        if not self._reported:
            self._reported = True
            self._breaker._reported(self._generation, self._round, failed)


class CircuitBreaker:
    """The breaker of one callee. `name` says in messages who that is; `on_change` hears of each change of state."""

    def __init__(
        self,
        name: str,
        settings: BreakerSettings,
        clock: Callable[[], float],
        on_change: Callable[[State, State], None] | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self._clock = clock
        self._on_change = on_change
        self._state = State.CLOSED
        # Counts changes of state: results of calls that began before the last one say nothing about the time after.
        self._generation = 0
        slice_s = settings.window_s / _SLICES
        self._calls = SlidingCount(slice_s, _SLICES, clock)
        self._failures = SlidingCount(slice_s, _SLICES, clock)
        self._in_a_row = 0
        self._unreported = 0
        self._changed_at = 0.0
        self._reopened = 0
        # Half-open: probes come in rounds of `probes`; a round whose probes hang makes way for the next.
        self._round = 0
        self._probing = 0
        self._probed_at = 0.0
        self._proved = 0

    @property
    def state(self) -> State:
        """For metrics. An open breaker whose wait is over stays open until somebody calls."""
        return self._state

    def refused_for_s(self) -> float:
        """Seconds until a call may be admitted; 0 when one is now. Changes nothing, so it can choose among servers."""
        if self._state is State.OPEN:
            return max(0.0, self._changed_at + self._wait_s() - self._clock())
        if self._state is State.HALF_OPEN and self._probing >= self.settings.probes:
            given_up_at = self._probed_at + self.settings.recovery_timeout_s
            # Probes usually report long before they would be given up.
            return max(0.0, min(given_up_at - self._clock(), self.settings.first_probe_s))
        return 0.0

    def undecided_for_s(self) -> float:
        """Seconds for which it is worth waiting for the probes that are under way, instead of being refused: they have
        just begun, and when they are answered everybody is let in. 0 when they take longer than answers do.
        """
        if self._state is not State.HALF_OPEN or self._probing < self.settings.probes:
            return 0.0
        return max(0.0, self._probed_at + UNDECIDED_S - self._clock())

    def admit(self) -> Permit:
        """Leave to make a call now. Raises Unavailable / BREAKER_OPEN, which says when to come back."""
        if (wait_s := self.refused_for_s()) > 0:
            raise Unavailable(f"{self.name} does not answer at the moment", reason=BREAKER_OPEN, retry_after_s=wait_s)
        if self._state is State.OPEN:
            self._change(State.HALF_OPEN)
        if self._state is State.HALF_OPEN:
            if self._probing >= self.settings.probes:
                self._next_round()
            self._probing += 1
            self._probed_at = self._clock()
        self._unreported += 1
        return Permit(self, self._generation, self._round)

    @property
    def is_tried(self) -> bool:
        """Whether a call is under way that was admitted in this state: it will say more than any look."""
        return self._unreported > 0

    def probe_succeeded(self) -> None:
        """A health check got its answer: calls may probe now, also when earlier probes still hang."""
        if self._state is State.OPEN:
            self._change(State.HALF_OPEN)
        elif self._state is State.HALF_OPEN:
            self._next_round()

    def _reported(self, generation: int, round_: int, failed: bool | None) -> None:
        if generation != self._generation:
            return
        self._unreported -= 1
        if self._state is State.HALF_OPEN:
            self._probe_reported(round_, failed)
        elif failed is not None:
            self._call_reported(failed)

    def _call_reported(self, failed: bool) -> None:
        self._calls.add()
        if not failed:
            self._in_a_row = 0
            return
        self._failures.add()
        self._in_a_row += 1
        calls = self._calls.total()
        too_many = calls >= self.settings.min_calls and self._failures.total() >= self.settings.failure_rate * calls
        if too_many or self._in_a_row >= self.settings.consecutive_failures:
            self._change(State.OPEN)

    def _probe_reported(self, round_: int, failed: bool | None) -> None:
        if round_ == self._round:
            self._probing -= 1
        if failed:
            self._reopened += 1
            self._change(State.OPEN)
        elif failed is False:
            self._proved += 1
            if self._proved >= self.settings.probes:
                self._reopened = 0
                self._change(State.CLOSED)

    def _change(self, state: State) -> None:
        before, self._state = self._state, state
        self._generation += 1
        self._changed_at = self._clock()
        self._calls.clear()
        self._failures.clear()
        self._in_a_row = self._proved = self._unreported = 0
        self._next_round()
        if self._on_change:
            self._on_change(before, state)

    def _next_round(self) -> None:
        self._round += 1
        self._probing = 0

    def _wait_s(self) -> float:
        settings = self.settings
        # Doubling is bounded before it is multiplied: 2.0**1024 is no float.
        return min(settings.first_probe_s * 2.0 ** min(self._reopened, 64), settings.recovery_timeout_s)
