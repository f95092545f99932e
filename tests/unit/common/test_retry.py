"""One call is retried only where that can help and in time; all calls together, only within the budget."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.breaker import BREAKER_OPEN
from common.limiter import OVERLOADED
from common.retry import RetryBudget, RetrySettings
from tests.support.clock import Clock

_POLICY = RetrySettings()
_GONE = errors.Unavailable("gone")
_ERRORS = st.one_of(
    st.builds(errors.Unavailable, st.just("gone"), retry_after_s=st.none() | st.floats(0, 5)),
    st.builds(errors.OutcomeUnknown, st.just("gone"), retry_after_s=st.none() | st.floats(0, 5)),
    st.builds(errors.ResourceExhausted, st.just("much"), retry_after_s=st.none() | st.floats(0, 5)),
    st.just(errors.DeadlineExceeded("late")),
)
_REMAINING = st.floats(-1, 20) | st.floats(0, 0.1)
_UNIT = st.floats(0, 1)


def _delay(attempt: int, error: BaseException, remaining_s: float, unit: float = 1.0) -> float | None:
    """The delay when chance is `unit`: 0 for the shortest wait, 1 for the longest."""
    return _POLICY.delay_before_attempt(attempt, error, remaining_s, lambda low, high: low + unit * (high - low))


@given(st.integers(-1, 6), _ERRORS, _REMAINING, _UNIT)
def test_a_retry_is_one_of_three_attempts_in_time_and_not_before_it_was_asked_for(
    attempt: int, error: errors.MemshardError, remaining_s: float, unit: float
) -> None:
    delay_s = _delay(attempt, error, remaining_s, unit)
    asked_s = error.retry_after_s or 0.0
    possible = 2 <= attempt <= 3 and asked_s <= 2.0 and remaining_s - 0.005 - asked_s >= 0
    assert (delay_s is not None) == possible
    if delay_s is not None:
        assert asked_s <= delay_s <= asked_s + min(0.5, 0.05 * 2 ** (attempt - 2))
        assert delay_s + 0.005 <= remaining_s + 1e-9


@given(st.integers(2, 3), st.sampled_from([0.0, 0.3, 1.0]), st.floats(0.006, 0.5), _UNIT)
def test_a_wait_is_cut_short_rather_than_given_up_when_the_deadline_is_near(
    attempt: int, asked_s: float, left_s: float, unit: float
) -> None:
    error = errors.Unavailable("gone", retry_after_s=asked_s)
    delay_s = _delay(attempt, error, asked_s + left_s, unit)
    assert delay_s is not None
    assert asked_s <= delay_s <= asked_s + left_s - 0.005 + 1e-9


@given(_ERRORS, st.integers(2, 3))
def test_any_moment_between_none_and_the_whole_backoff_is_as_likely(error: errors.MemshardError, attempt: int) -> None:
    seen: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        seen.append((low, high))
        return low

    if _POLICY.delay_before_attempt(attempt, error, 100.0, uniform) is not None:
        assert seen == [(0.0, 0.05 * 2 ** (attempt - 2))]


def test_waits_double_up_to_their_cap() -> None:
    policy = replace(_POLICY, attempts=10)
    waits = [policy.delay_before_attempt(n, _GONE, 100.0, lambda _, high: high) for n in range(2, 11)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("bad"),
        errors.NotFound("none"),
        errors.ReadOnly("not now"),
        errors.VersionMismatch("other"),
        errors.Internal("bug"),
        errors.Unavailable("not asked", reason=BREAKER_OPEN, retry_after_s=0.1),
        errors.ResourceExhausted("full", reason=OVERLOADED, retry_after_s=0.1),
        OSError("no domain error"),
    ],
    ids=lambda error: getattr(error, "reason", "other"),
)
def test_what_another_attempt_cannot_help_or_was_refused_at_once_goes_to_the_caller(error: BaseException) -> None:
    assert _delay(2, error, 100.0) is None


def test_what_asks_for_a_long_wait_goes_to_the_caller() -> None:
    assert _delay(2, errors.Unavailable("gone", retry_after_s=2.0), 100.0, 0.0) == 2.0
    assert _delay(2, errors.Unavailable("gone", retry_after_s=2.1), 100.0, 0.0) is None


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"attempts": 11}, {"base_s": 0.0}, {"cap_s": 0.01}, {"least_attempt_s": -1.0}], ids=str
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="retries"):
        replace(_POLICY, **wrong)  # type: ignore[arg-type]  # Wrong on purpose.


# A step: some sixteenths of a second go by, then so many requests come, then so many retries are wanted.
_STEPS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 400), st.integers(0, 300)), max_size=40)


@given(_STEPS)
def test_no_ten_seconds_up_to_a_retry_have_more_of_them_than_a_fifth_of_the_requests_and_ten_a_second(
    steps: list[tuple[int, int, int]],
) -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    requests: list[tuple[float, int]] = []
    retries: list[tuple[float, int]] = []
    for sixteenths, requested, wanted in steps:
        clock.pass_(sixteenths / 16)
        for _ in range(requested):
            budget.deposit()
        requests.append((clock.now, requested))
        retried = sum(budget.withdraw() for _ in range(wanted))
        retries.append((clock.now, retried))
        if retried:
            within = sum(n for at, n in requests if clock.now - at < 10.0)
            spent = sum(n for at, n in retries if clock.now - at <= 10.0)
            assert spent <= 0.2 * within + 100


@given(st.integers(0, 500), st.integers(30, 90))
def test_with_every_shard_down_attempts_are_a_fifth_more_and_ten_a_second(per_s: int, seconds: int) -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    retries = 0
    for _ in range(seconds):
        clock.pass_(1.0)
        for _ in range(per_s):
            budget.deposit()
        while retries < 3 * per_s * seconds and budget.withdraw():
            retries += 1
    # A period of ten seconds may end anywhere, so a run of other length has one more of them at most.
    periods = math.ceil(seconds / 10)
    assert retries <= 0.2 * per_s * 10 * periods + 100 * periods
    if per_s >= 10:
        # And they are made use of, less what is remembered a second longer: 9 of 11 seconds.
        assert retries >= (9 / 11) * (0.2 * per_s + 10) * (seconds - 11)


def test_a_process_that_has_just_started_may_retry() -> None:
    budget = RetryBudget(Clock())
    assert budget.balance() == 100
    assert sum(budget.withdraw() for _ in range(200)) == 100


def test_credit_is_not_saved_for_longer_than_the_window() -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    for _ in range(100_000):
        budget.deposit()
    clock.pass_(10.0)
    assert budget.balance() == 100
