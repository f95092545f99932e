"""When a circuit breaker opens and how it closes again, and the settings for each of those we call."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    """When a breaker opens and how it closes again. Raises ValueError for what cannot work."""

    consecutive_failures: int
    """Failures in a row that open it."""

    failure_rate: float
    """Share of failures in the window that opens it, 0 to 1, once there were `min_calls`."""

    window_s: float
    """Seconds that the share looks back on."""

    recovery_timeout_s: float
    """Longest wait, in seconds, between one probe and the next; also after how many seconds a probe that nobody
    reported is given up (resilience4j's stay half-open for ever then: its issue 903)."""

    slow_call_s: float
    """Seconds from which a success is a failure."""

    fair_timeout_s: float
    """Seconds that a call must have had for its timeout to speak of the callee. Below, the caller was in a hurry, and
    a hurried caller must not cut off the others."""

    min_calls: int = 20
    """Calls in the window before their share of failures says anything."""

    first_probe_s: float = 1.0
    """Seconds from opening to the first probe; doubled with each that fails."""

    probes: int = 3
    """Probes in flight at once while half-open, and how many must succeed to close it."""

    def __post_init__(self) -> None:
        if min(self.consecutive_failures, self.min_calls, self.probes) < 1:
            raise ValueError("a breaker needs at least one failure, call and probe")
        if not 0 < self.failure_rate <= 1:
            raise ValueError("failure_rate is a share above 0 and up to 1")
        if not 0 < self.first_probe_s <= self.recovery_timeout_s:
            raise ValueError("first_probe_s must be above 0 and at most recovery_timeout_s")


# Reads of one user take milliseconds and batches of 8 MiB under a second: 5 s is half of the default deadline, and as
# much a failure for whoever waits. A timeout after 200 ms, the first limit of `common.level`, was a fair chance.
SHARD = BreakerSettings(
    consecutive_failures=5,
    failure_rate=0.5,
    window_s=30.0,
    recovery_timeout_s=30.0,
    slow_call_s=5.0,
    fair_timeout_s=0.2,
)
# Services of others: rate limits make single failures common, and a call's own timeout is 5 s. Of a caller's time half
# is theirs, less than a second of two. One text takes tens of milliseconds, so that 250 ms were a fair chance.
EMBEDDER = BreakerSettings(
    consecutive_failures=10,
    failure_rate=0.7,
    window_s=60.0,
    recovery_timeout_s=60.0,
    slow_call_s=4.0,
    fair_timeout_s=0.25,
)
# No request needs it, but one that met a shard which knows of a newer topology: that one waits for a look.
CATALOG = BreakerSettings(
    consecutive_failures=5,
    failure_rate=0.5,
    window_s=30.0,
    recovery_timeout_s=5.0,
    slow_call_s=2.0,
    fair_timeout_s=0.5,
    # It is asked once, and then listened to.
    probes=1,
)
# Redis gets 50 ms, since asking every shard takes less; an answer at 40 ms helps nobody. No caller's deadline is
# shorter than its timeout on purpose, so 10 ms were a fair chance.
CACHE = BreakerSettings(
    consecutive_failures=5,
    failure_rate=0.5,
    window_s=5.0,
    recovery_timeout_s=5.0,
    slow_call_s=0.04,
    fair_timeout_s=0.01,
)
