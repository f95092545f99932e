from local.backoff import Backoff


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_delay_doubles_from_a_tenth_of_a_second_to_five_seconds() -> None:
    backoff = Backoff(Clock())
    assert [backoff.died() for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_ten_seconds_of_health_are_forgiveness() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    for _ in range(5):
        backoff.died()
    backoff.healthy()
    clock.now += 10
    assert backoff.died() == 0.1


def test_less_health_is_not() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    for _ in range(3):
        backoff.died()
    backoff.healthy()
    clock.now += 9.9
    assert backoff.died() == 0.8


def test_health_counts_once() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    backoff.healthy()
    clock.now += 60
    assert [backoff.died(), backoff.died()] == [0.1, 0.2]
