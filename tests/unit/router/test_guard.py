"""Whose timeouts and slow answers speak of a server, and whose of nobody but themselves."""

from contextlib import suppress

import pytest

from common.breaker import State
from common.errors import DeadlineExceeded, NotFound, Unavailable
from common.limiter import Priority
from common.telemetry.registry import REGISTRY
from router.guard import Guard, Guards, Kind
from tests.support.clock import Clock


class Watched:
    """A guard on a clock of the test's own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.guard: Guard = Guards(self.clock).of("shard-0")

    def answered(self, slot: int | None, took_s: float = 0.005, priority: Priority = Priority.INTERACTIVE) -> None:
        with self.guard.passing(Kind.SEARCH, "Search", priority, slot):
            self.clock.pass_(took_s)

    def timed_out(self, slot: int | None, after_s: float = 0.5) -> None:
        error = DeadlineExceeded("it took too long")
        with (
            suppress(DeadlineExceeded),
            self.guard.passing(Kind.SEARCH, "Search", Priority.INTERACTIVE, slot),
        ):
            self.clock.pass_(after_s)
            raise error

    def state(self) -> State:
        return self.guard.breakers[Kind.SEARCH].state


@pytest.mark.parametrize("slot", [1, None], ids=["a large user", "searches of all users"])
def test_who_times_out_alone_cuts_off_nobody_else(slot: int | None) -> None:
    watched = Watched()
    for _ in range(300):
        for other in (2, 3):
            watched.answered(other)
        for _ in range(4):
            watched.timed_out(slot)
        assert watched.state() is State.CLOSED
    assert watched.guard.limiter.limit >= 64


def test_timeouts_of_several_open_the_breaker() -> None:
    watched = Watched()
    for number in range(200):
        watched.answered(1)
        watched.timed_out(100 + number % 20)
        if watched.state() is State.OPEN:
            return
    pytest.fail("a server that fails half of all calls was asked on")


def test_where_there_is_nobody_else_a_few_in_a_row_open_it() -> None:
    watched = Watched()
    for _ in range(5):
        assert watched.state() is State.CLOSED
        watched.timed_out(1)
    assert watched.state() is State.OPEN


def test_who_tries_a_breaker_that_is_half_open_counts() -> None:
    watched = Watched()
    for _ in range(5):
        watched.timed_out(1)
    watched.guard.heard()
    assert watched.state() is State.HALF_OPEN
    watched.timed_out(1)
    assert watched.state() is State.OPEN


def heard_for(watched: Watched, seconds: int) -> None:
    """The server answers a look at its health each second."""
    for _ in range(seconds):
        watched.clock.pass_(1)
        watched.guard.heard()


def test_reads_that_nobody_asks_for_are_tried_by_looks_at_the_servers_health_and_writes_are_not() -> None:
    watched = Watched()
    for kind in Kind:
        for _ in range(5):
            error = Unavailable("gone")
            with suppress(Unavailable), watched.guard.passing(kind, kind.value, Priority.INTERACTIVE, 1):
                raise error
    heard_for(watched, 19)
    # What answers looks may hang in calls: the last of those decides for a while.
    assert {breaker.state for breaker in watched.guard.breakers.values()} == {State.HALF_OPEN}
    heard_for(watched, 4)
    states = {kind: breaker.state for kind, breaker in watched.guard.breakers.items()}
    assert states == {Kind.STORE: State.HALF_OPEN, Kind.RETRIEVE: State.CLOSED, Kind.SEARCH: State.CLOSED}


def test_a_call_under_way_says_more_than_looks() -> None:
    watched = Watched()
    for _ in range(5):
        watched.timed_out(1)
    heard_for(watched, 1)
    error = DeadlineExceeded("it took too long")
    with suppress(DeadlineExceeded), watched.guard.passing(Kind.SEARCH, "Search", Priority.INTERACTIVE, 1):
        heard_for(watched, 60)
        assert watched.state() is State.HALF_OPEN
        raise error
    assert watched.state() is State.OPEN


def test_timeouts_count_again_after_a_while() -> None:
    watched = Watched()
    for _ in range(4):
        watched.timed_out(1)
    watched.answered(2)
    for _ in range(10):
        watched.timed_out(1)
    assert watched.state() is State.CLOSED
    watched.clock.pass_(60)
    watched.answered(2)
    for _ in range(5):
        watched.timed_out(1)
    assert watched.state() is State.OPEN


def series_of(server: str) -> set[str]:
    """The names of the samples that are about a server."""
    return {
        sample.name
        for family in REGISTRY.collect()
        for sample in family.samples
        if server in (sample.labels.get("server"), sample.labels.get("name"))
    }


def test_a_server_that_has_left_leaves_no_series_behind() -> None:
    guards = Guards(Clock())
    for key in (("leaves", None), ("stays", None), ("stays", "leaves-too")):
        with guards.of(*key).passing(Kind.SEARCH, "Search", Priority.INTERACTIVE):
            pass
    names = {"leaves", "stays", "stays/leaves-too"}
    of_one = series_of("stays")
    assert of_one >= {
        "memory_server_calls_total",
        "memory_server_call_duration_seconds_count",
        "memory_breaker_opened_total",
    }
    assert [series_of(name) for name in sorted(names)] == [of_one] * 3
    in_flight = guards.of("leaves").passing(Kind.STORE, "Store", Priority.INTERACTIVE)
    with in_flight:
        guards.keep({("stays", None)})
    assert series_of("leaves") == series_of("stays/leaves-too") == set()
    assert series_of("stays") == of_one
    # One that comes back counts from the beginning.
    with guards.of("leaves").passing(Kind.SEARCH, "Search", Priority.INTERACTIVE):
        pass
    assert series_of("leaves") == of_one


@pytest.mark.parametrize("slot", [1, None], ids=["a large user", "searches of all users"])
@pytest.mark.parametrize("others", [0, 1])
def test_slow_answers_of_one_cut_off_nobody_else(slot: int | None, others: int) -> None:
    watched = Watched()
    for _ in range(50):
        for _ in range(others):
            watched.answered(2)
        for _ in range(5):
            watched.answered(slot, took_s=6.0)
        assert watched.state() is State.CLOSED


def test_slow_answers_of_several_open_the_breaker() -> None:
    watched = Watched()
    for number in range(5):
        assert watched.state() is State.CLOSED
        watched.answered(100 + number, took_s=6.0)
    assert watched.state() is State.OPEN


def test_refusals_that_come_late_are_slow_answers() -> None:
    watched = Watched()
    for number in range(20):
        slot = 1 if number < 10 else number
        with (
            suppress(NotFound, Unavailable),
            watched.guard.passing(Kind.SEARCH, "Search", Priority.INTERACTIVE, slot),
        ):
            watched.clock.pass_(6.0)
            raise NotFound("no such memory")
        if number < 10:
            assert watched.state() is State.CLOSED
    assert watched.state() is State.OPEN


def test_batches_are_long_by_nature() -> None:
    watched = Watched()
    for number in range(50):
        watched.answered(number, took_s=8.0, priority=Priority.BATCH)
    assert watched.state() is State.CLOSED
