"""A breaker's every change of state, and a naive model beside it over random histories."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import errors
from common.breaker import BREAKER_OPEN, UNDECIDED_S, CircuitBreaker, Permit, State, speaks_of_callee
from common.breaker_settings import CACHE, EMBEDDER, SHARD, BreakerSettings
from tests.support.clock import Clock

_SMALL = BreakerSettings(
    consecutive_failures=3,
    failure_rate=0.5,
    window_s=10.0,
    recovery_timeout_s=8.0,
    slow_call_s=2.0,
    fair_timeout_s=0.5,
    min_calls=4,
    probes=2,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[tuple[State, State]]:
    return []


@pytest.fixture
def breaker(clock: Clock, changes: list[tuple[State, State]]) -> CircuitBreaker:
    return CircuitBreaker("shard-0", _SMALL, clock, lambda before, after: changes.append((before, after)))


def _expect(breaker: CircuitBreaker, state: State) -> None:
    # In a function of its own, since mypy takes a property that was compared for a constant.
    assert breaker.state is state


def _open(breaker: CircuitBreaker) -> None:
    for _ in range(breaker.settings.consecutive_failures):
        breaker.admit().failure()
    _expect(breaker, State.OPEN)


def _refused_for_s(breaker: CircuitBreaker) -> float:
    with pytest.raises(errors.Unavailable) as raised:
        breaker.admit()
    assert raised.value.reason == BREAKER_OPEN
    assert raised.value.retry_after_s == breaker.refused_for_s()
    return breaker.refused_for_s()


def test_probes_are_worth_waiting_for_while_they_have_just_begun(breaker: CircuitBreaker, clock: Clock) -> None:
    _open(breaker)
    assert breaker.undecided_for_s() == 0, "nobody is finding out anything"
    clock.pass_(1)
    first = breaker.admit()
    assert breaker.undecided_for_s() == 0, "one more may try"
    clock.pass_(0.05)
    second = breaker.admit()
    assert breaker.undecided_for_s() == pytest.approx(UNDECIDED_S)
    clock.pass_(UNDECIDED_S / 2)
    assert breaker.undecided_for_s() == pytest.approx(UNDECIDED_S / 2)
    clock.pass_(UNDECIDED_S)
    assert breaker.undecided_for_s() == 0, "they take too long"
    first.success(0.1)
    assert breaker.undecided_for_s() == 0, "one more may try"
    second.success(0.1)
    _expect(breaker, State.CLOSED)
    assert breaker.undecided_for_s() == 0


def test_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    for _ in range(2):
        breaker.admit().failure()
    _expect(breaker, State.CLOSED)
    breaker.admit().failure()
    _expect(breaker, State.OPEN)


def test_a_success_between_failures_begins_the_row_again(breaker: CircuitBreaker) -> None:
    breaker.admit().failure()
    breaker.admit().failure()
    for _ in range(10):
        breaker.admit().success(0.01)
    breaker.admit().failure()
    breaker.admit().failure()
    _expect(breaker, State.CLOSED)


def test_a_share_of_failures_opens_it_from_the_least_number_of_calls_on(breaker: CircuitBreaker) -> None:
    breaker.admit().failure()
    breaker.admit().success(0.01)
    breaker.admit().failure()
    _expect(breaker, State.CLOSED)  # Two thirds, of three calls.
    breaker.admit().success(0.01)
    breaker.admit().failure()
    _expect(breaker, State.OPEN)  # Three of five.


def test_failures_older_than_the_window_are_forgotten(breaker: CircuitBreaker, clock: Clock) -> None:
    for _ in range(2):
        breaker.admit().failure()
        breaker.admit().success(0.01)
        clock.pass_(10.0)
    breaker.admit().failure()
    breaker.admit().success(0.01)
    breaker.admit().success(0.01)
    breaker.admit().success(0.01)
    breaker.admit().failure()
    _expect(breaker, State.CLOSED)  # Two of five, after ten seconds in which two others left the window.


def test_slow_answers_are_failures(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        breaker.admit().success(1.99)
    _expect(breaker, State.CLOSED)
    for _ in range(3):
        breaker.admit().success(2.0)
    _expect(breaker, State.OPEN)


def test_what_says_nothing_of_the_callee_changes_nothing(breaker: CircuitBreaker) -> None:
    for _ in range(50):
        breaker.admit().ignore()
    breaker.admit().failure()
    breaker.admit().failure()
    breaker.admit().ignore()
    breaker.admit().failure()
    _expect(breaker, State.OPEN)  # Nor does it begin the row again.


def test_callers_in_a_hurry_do_not_cut_off_the_others(breaker: CircuitBreaker) -> None:
    for _ in range(50):
        breaker.admit().timeout(0.49)
    _expect(breaker, State.CLOSED)
    for _ in range(3):
        breaker.admit().timeout(0.5)
    _expect(breaker, State.OPEN)


def test_the_first_probe_is_after_a_second_then_twice_as_long_each_time_up_to_the_recovery_timeout(
    clock: Clock,
) -> None:
    breaker = CircuitBreaker("shard-0", SHARD, clock)
    _open(breaker)
    waits = []
    for _ in range(7):
        waits.append(wait_s := _refused_for_s(breaker))
        clock.pass_(wait_s - 0.001)
        assert _refused_for_s(breaker) == pytest.approx(0.001)
        clock.pass_(0.002)
        breaker.admit().failure()
        _expect(breaker, State.OPEN)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_after_closing_the_first_probe_is_after_a_second_again(breaker: CircuitBreaker, clock: Clock) -> None:
    _open(breaker)
    clock.pass_(1.0)
    breaker.admit().failure()
    clock.pass_(2.0)
    breaker.admit().success(0.01)
    breaker.admit().success(0.01)
    _expect(breaker, State.CLOSED)
    _open(breaker)
    assert _refused_for_s(breaker) == 1.0


def test_a_health_check_that_succeeds_half_opens_at_once(breaker: CircuitBreaker) -> None:
    breaker.probe_succeeded()
    _expect(breaker, State.CLOSED)
    _open(breaker)
    breaker.probe_succeeded()
    _expect(breaker, State.HALF_OPEN)
    breaker.admit().success(0.01)
    breaker.admit().success(0.01)
    _expect(breaker, State.CLOSED)


def test_half_open_lets_in_a_few_probes_and_no_more(breaker: CircuitBreaker, clock: Clock) -> None:
    _open(breaker)
    clock.pass_(1.0)
    first = breaker.admit()
    breaker.admit()
    assert _refused_for_s(breaker) == 1.0
    first.success(0.01)
    breaker.admit()
    _refused_for_s(breaker)


@pytest.mark.parametrize("end", [Permit.ignore, lambda permit: permit.timeout(0.1)])
def test_a_probe_that_says_nothing_gives_its_place_to_another(
    breaker: CircuitBreaker, clock: Clock, end: Callable[[Permit], None]
) -> None:
    _open(breaker)
    clock.pass_(1.0)
    for _ in range(20):
        end(breaker.admit())
    _expect(breaker, State.HALF_OPEN)
    breaker.admit().success(0.01)
    breaker.admit().success(0.01)
    _expect(breaker, State.CLOSED)


def test_a_slow_probe_opens_it_again(breaker: CircuitBreaker, clock: Clock) -> None:
    _open(breaker)
    clock.pass_(1.0)
    breaker.admit().success(2.0)
    _expect(breaker, State.OPEN)


def test_probes_that_hang_make_way_when_a_health_check_succeeds(breaker: CircuitBreaker, clock: Clock) -> None:
    _open(breaker)
    clock.pass_(1.0)
    hanging = [breaker.admit(), breaker.admit()]
    _refused_for_s(breaker)
    breaker.probe_succeeded()
    fresh = [breaker.admit(), breaker.admit()]
    _refused_for_s(breaker)
    for permit in hanging:
        permit.ignore()  # Their places were given away: they leave none free.
    _refused_for_s(breaker)
    for permit in fresh:
        permit.success(0.01)
    _expect(breaker, State.CLOSED)


def test_probes_that_nobody_reports_are_given_up_after_the_recovery_timeout(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    _open(breaker)
    clock.pass_(1.0)
    breaker.admit()
    breaker.admit()
    clock.pass_(7.5)
    assert _refused_for_s(breaker) == 0.5
    clock.pass_(0.5)
    breaker.admit().success(0.01)
    breaker.admit().success(0.01)
    _expect(breaker, State.CLOSED)


def test_late_results_do_not_count_for_a_new_state(
    breaker: CircuitBreaker, clock: Clock, changes: list[tuple[State, State]]
) -> None:
    while_closed = [breaker.admit() for _ in range(12)]
    _open(breaker)
    while_closed.pop().success(0.01)
    while_closed.pop().failure()
    assert _refused_for_s(breaker) == 1.0
    clock.pass_(1.0)
    probe = breaker.admit()
    for permit in while_closed[:4]:
        permit.success(0.01)
    while_closed[4].failure()
    _expect(breaker, State.HALF_OPEN)
    second = breaker.admit()
    probe.success(0.01)
    second.success(0.01)
    _expect(breaker, State.CLOSED)
    for permit in while_closed[5:]:
        permit.failure()
    _expect(breaker, State.CLOSED)
    assert changes == [
        (State.CLOSED, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.CLOSED),
    ]


def test_a_permit_counts_once(breaker: CircuitBreaker) -> None:
    permit = breaker.admit()
    for _ in range(5):
        permit.failure()
    _expect(breaker, State.CLOSED)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.Unavailable("gone", reason="SHARD_UNAVAILABLE"), True),
        (errors.Unavailable("gone", reason="DATABASE_UNAVAILABLE"), True),
        (errors.Unavailable("gone", reason="EMBEDDER_UNAVAILABLE"), True),
        (errors.OutcomeUnknown("gone"), True),
        (errors.DeadlineExceeded("late"), True),
        (errors.Unavailable("not asked", reason=BREAKER_OPEN), False),
        (errors.Unavailable("one slot", reason="SLOT_BUSY"), False),
        (errors.Unavailable("one slot", reason="TOPOLOGY_CHANGING"), False),
        (errors.Unavailable("by hand", reason="SHARD_MAINTENANCE"), False),
        (errors.Unavailable("the text", reason="EMBEDDER_REFUSED"), False),
        (errors.InvalidArgument("bad"), False),
        (errors.NotFound("none"), False),
        (errors.AlreadyExists("taken"), False),
        (errors.ReadOnly("later"), False),
        (errors.WrongShard("moved", epoch=2), False),
        (errors.VersionMismatch("other"), False),
        (errors.ResourceExhausted("too much"), False),
        (errors.Internal("bug"), False),
        (errors.Unimplemented("not yet"), False),
    ],
    ids=lambda value: value.reason if isinstance(value, errors.MemshardError) else "",
)
def test_only_errors_of_the_callee_are_its_failures(error: errors.MemshardError, expected: bool) -> None:
    assert speaks_of_callee(error) is expected


def test_the_reasons_named_here_are_those_in_use() -> None:
    """A reason that was renamed elsewhere would make its errors count."""
    from common.breaker import _NOT_OF_THE_CALLEE  # noqa: PLC0415
    from common.embedder import TEXT_REFUSED  # noqa: PLC0415

    assert TEXT_REFUSED in _NOT_OF_THE_CALLEE


def test_defaults_are_the_ones_promised() -> None:
    assert (SHARD.consecutive_failures, SHARD.window_s, SHARD.failure_rate, SHARD.recovery_timeout_s) == (
        5,
        30,
        0.5,
        30,
    )
    assert (EMBEDDER.consecutive_failures, EMBEDDER.window_s, EMBEDDER.failure_rate) == (10, 60, 0.7)
    assert (CACHE.consecutive_failures, CACHE.window_s, CACHE.recovery_timeout_s) == (5, 5, 5)
    assert {s.first_probe_s for s in (SHARD, EMBEDDER, CACHE)} == {1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"consecutive_failures": 0},
        {"min_calls": 0},
        {"probes": 0},
        {"failure_rate": 0.0},
        {"failure_rate": 1.1},
        {"first_probe_s": 0.0},
        {"recovery_timeout_s": 0.5},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"breaker|failure_rate|first_probe_s"):
        replace(SHARD, **wrong)  # type: ignore[arg-type]  # Wrong on purpose.


class BreakerMachine(RuleBasedStateMachine):
    """The model keeps everything that happened, and decides by looking through it."""

    @initialize(
        consecutive=st.integers(1, 4),
        rate=st.sampled_from([0.25, 0.5, 1.0]),
        calls=st.integers(1, 8),
        n=st.integers(1, 3),
    )
    def begin(self, consecutive: int, rate: float, calls: int, n: int) -> None:
        self.settings = replace(_SMALL, consecutive_failures=consecutive, failure_rate=rate, min_calls=calls, probes=n)
        self.clock = Clock()
        self.changes: list[tuple[State, State]] = []
        self.breaker = CircuitBreaker("x", self.settings, self.clock, lambda a, b: self.changes.append((a, b)))
        self.open_permits: list[tuple[Permit, int, int]] = []  # With the period and the round they are of.
        self.expected_changes: list[tuple[State, State]] = []
        self.state = State.CLOSED
        self.waits = iter([1.0])
        self.period = 0
        self.enter(State.CLOSED)
        self.expected_changes.clear()

    def enter(self, state: State) -> None:
        self.expected_changes.append((self.state, state))
        if state is State.CLOSED:
            self.waits = self.doubling()
        if state is State.OPEN:
            self.opens_at = self.clock.now + next(self.waits)
        self.state = state
        self.period += 1
        self.results: list[tuple[float, bool]] = []
        self.round = 0
        self.last_probe_at = self.clock.now

    def doubling(self) -> Iterator[float]:
        wait_s = 1.0
        while True:
            yield min(wait_s, self.settings.recovery_timeout_s)
            wait_s *= 2

    def probing(self) -> int:
        return sum((period, round_) == (self.period, self.round) for _, period, round_ in self.open_permits)

    @rule(quarters=st.sampled_from([1, 2, 4, 8, 32, 64]))
    def time_passes(self, quarters: int) -> None:
        self.clock.pass_(quarters / 4)

    @rule()
    def call(self) -> None:
        allowed = self.state is State.CLOSED
        if self.state is State.OPEN and self.clock.now >= self.opens_at:
            self.enter(State.HALF_OPEN)
        if self.state is State.HALF_OPEN:
            if self.probing() >= self.settings.probes and (
                self.clock.now >= self.last_probe_at + self.settings.recovery_timeout_s
            ):
                self.round += 1
            allowed = self.probing() < self.settings.probes
        if allowed:
            assert self.breaker.refused_for_s() == 0
            self.open_permits.append((self.breaker.admit(), self.period, self.round))
            self.last_probe_at = self.clock.now
        else:
            assert 0 < _refused_for_s(self.breaker) <= self.settings.recovery_timeout_s

    @precondition(lambda self: self.open_permits)
    @rule(data=st.data(), outcome=st.sampled_from(["good", "slow", "failed", "late", "hurried", "ignored"]))
    def answer(self, data: st.DataObject, outcome: str) -> None:
        index = data.draw(st.integers(0, len(self.open_permits) - 1))
        permit, period, _ = self.open_permits.pop(index)
        {
            "good": lambda: permit.success(self.settings.slow_call_s / 2),
            "slow": lambda: permit.success(self.settings.slow_call_s),
            "failed": permit.failure,
            "late": lambda: permit.timeout(self.settings.fair_timeout_s),
            "hurried": lambda: permit.timeout(self.settings.fair_timeout_s / 2),
            "ignored": permit.ignore,
        }[outcome]()
        permit.failure()  # Reported already, so it counts for nothing.
        if period == self.period and outcome not in ("hurried", "ignored"):
            self.count(failed=outcome != "good")

    def count(self, failed: bool) -> None:
        self.results.append((self.clock.now, failed))
        if self.state is State.HALF_OPEN:
            if failed:
                self.enter(State.OPEN)
            elif len(self.results) >= self.settings.probes:
                self.enter(State.CLOSED)
            return
        last = [was_failed for _, was_failed in self.results[-self.settings.consecutive_failures :]]
        in_a_row = len(last) == self.settings.consecutive_failures and all(last)
        lately = [was_failed for at, was_failed in self.results if int(self.clock.now) - int(at) < 10]
        too_many = len(lately) >= self.settings.min_calls and sum(lately) >= self.settings.failure_rate * len(lately)
        if failed and (in_a_row or too_many):
            self.enter(State.OPEN)

    @rule()
    def health_check_succeeds(self) -> None:
        self.breaker.probe_succeeded()
        if self.state is State.OPEN:
            self.enter(State.HALF_OPEN)
        elif self.state is State.HALF_OPEN:
            self.round += 1

    @invariant()
    def agrees(self) -> None:
        assert self.breaker.state is self.state
        assert self.changes == self.expected_changes


BreakerMachine.TestCase.settings = hypothesis_settings(max_examples=100, stateful_step_count=60)
TestBreakerAgainstItsModel = BreakerMachine.TestCase
