"""How the limit of calls in flight moves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LimiterSettings:
    """Bounds, speeds and shares. Raises ValueError for what cannot work."""

    initial: int = 64
    """Calls in flight at the start, until latencies say more: a burst of a few dozen callers is common then."""

    least: int = 4
    """The limit never falls below. That few in flight hardly queue, even on one core."""

    usual: int = 0
    """Below this limit only calls that take longer than `bearable_s` are too slow: a queue of a few dozen is short,
    whatever the machine, and to refuse them would turn away a team of agents on a busy laptop."""

    bearable_s: float = 0.5
    """Average latency in seconds which is put up with before the limit falls below `usual`: a quarter of the two
    seconds that an impatient caller waits, so that a hiccup of the machine does not make all of them late."""

    most: int = 1000
    """The limit never rises above: what a process can hold in memory, at up to 8 MiB for the largest requests."""

    batch_share: float = 0.7
    """Batches are let in only up to this share of the limit, so that interactive calls find room at any time."""

    tolerance: float = 2.0
    """Slowdown that is taken for no queue (GradientLimit's rttTolerance). Lower refuses sooner, and a busy machine
    with two cores is twice as slow as a quiet one before anything queues."""

    unnoticed_s: float = 0.01
    """Average latency, in seconds, up to which nothing is refused whatever the slowdown: behind one long call, short
    ones are many times slower, and nobody minds 10 ms."""

    window_s: float = 0.1
    """Least time in seconds between changes of the limit."""

    window_calls: int = 10
    """Calls that must have ended between changes of the limit."""

    probe_every_s: float = 10.0
    """Seconds after which the quiet latency is measured anew."""

    probe_calls: int = 20
    """Quiet calls that make a measurement; the limit is low until so many have ended."""

    probe_s: float = 1.0
    """Longest time, in seconds, that the limit is low for a measurement."""

    retry_after_s: float = 1.0
    """Seconds after which a refused interactive call may come back."""

    batch_retry_after_s: float = 5.0
    """Seconds after which a refused batch may come back: when it is busy, they wait for longer."""

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.initial <= self.most or self.usual > self.most:
            raise ValueError("the limits must be 1 <= least <= initial <= most, and usual <= most")
        if not 0 < self.batch_share <= 1 or self.tolerance < 1:
            raise ValueError("batch_share is a share above 0 and up to 1, tolerance at least 1")


# A server of a shard has some sixteen connections to its database: that many calls in flight do not queue, and are what
# quiet latency is measured with. With four times as many the queue is short. The limit begins there, as more would have
# to wait seconds in the queue of a slow machine before latencies could say that it was too many.
SERVER = LimiterSettings(least=16, usual=64, initial=64)
