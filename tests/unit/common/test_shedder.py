"""The share of requests that is let in, against queues that are simulated."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.limiter import Priority
from common.shedder import Shedder, ShedderSettings

_TARGET_S = ShedderSettings().target_s


class Process:
    """A process that can do `capacity` requests a second, and a refusal at a tenth of the price of a request."""

    def __init__(self, shedder: Shedder, capacity: float) -> None:
        self.shedder = shedder
        self.capacity = capacity
        self.queue_s = 0.0

    def run(self, seconds: float, offered: float) -> tuple[float, float]:
        """Requests done a second, and the longest that the queue was, in seconds, in the second half of the time."""
        done, longest = 0, 0.0
        looks = int(seconds * 10)
        for look in range(looks):
            self.shedder.at_work = 256
            for _ in range(int(offered / 10)):
                let_in = self.shedder.admits()
                self.queue_s += (1 if let_in else 0.1) / self.capacity
                if look >= looks / 2:
                    done += let_in
            self.queue_s = max(0.0, self.queue_s - 0.1)
            if look >= looks / 2:
                longest = max(longest, self.queue_s)
            self.shedder.observe(self.queue_s)
        return done / (seconds / 2), longest


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_under_overload_the_queue_stays_short_and_most_of_the_capacity_is_used(factor: float) -> None:
    shedder = Shedder(uniform=random.Random(1).random)
    done, queue_s = Process(shedder, 1000).run(20, factor * 1000)
    # Refusals cost a tenth each: that much of the capacity is not to be had.
    possible = 1000 * (1 - 0.1 * factor) / 0.9
    assert done > 0.8 * possible
    assert queue_s < 0.1


def test_without_overload_nothing_is_refused() -> None:
    shedder = Shedder(uniform=lambda: 0.999999)
    done, _ = Process(shedder, 1000).run(10, 500)
    assert done == pytest.approx(500, rel=0.05)
    assert shedder.share(Priority.BATCH) == 1.0


def test_when_the_load_is_gone_all_are_let_in_again_within_ten_seconds() -> None:
    shedder = Shedder()
    for _ in range(100):
        shedder.observe(1.0)
    assert shedder.share(Priority.INTERACTIVE) < 0.05
    for _ in range(100):
        shedder.observe(0.0)
    assert shedder.share(Priority.BATCH) == 1.0


def test_a_few_requests_and_single_bursts_on_a_busy_machine_are_never_refused() -> None:
    shedder = Shedder(uniform=lambda: 0.999999)
    for look in range(100):
        shedder.at_work = 1000 if look % 2 else ShedderSettings().undisturbed
        assert shedder.admits()
        assert shedder.admits(Priority.BATCH)
        shedder.observe(1.0)
    shedder.at_work = ShedderSettings().undisturbed + 1
    for _ in range(3):
        shedder.observe(1.0)
    assert not shedder.admits()


@given(st.lists(st.floats(0, 10), max_size=50))
def test_batches_make_way_first_and_shares_are_shares(lates: list[float]) -> None:
    shedder = Shedder()
    for late_s in lates:
        before = shedder.share(Priority.INTERACTIVE), shedder.share(Priority.BATCH)
        shedder.observe(late_s)
        interactive, batch = shedder.share(Priority.INTERACTIVE), shedder.share(Priority.BATCH)
        assert 0 <= batch <= interactive <= 1
        assert interactive > 0
        assert batch == 0 or interactive == 1
        # Late: never more than before; in time: never less.
        changed = (interactive, batch)
        assert changed <= before if late_s >= _TARGET_S else changed >= before
