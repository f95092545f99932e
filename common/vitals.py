"""What there is to see of a shard or of the cluster at one moment, from which `common.level` decides. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

MIN_CALLS = 20
"""Calls below which neither their share of failures nor their slowest hundredth says anything (as for a breaker)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """One look. All shares are 0 to 1; the defaults are those of something that is well."""

    error_rate: float = 0.0
    """Share of calls that failed. What we refused by ourselves is no call."""

    p99_latency_s: float = 0.0
    """Seconds that 99 of 100 interactive calls take at most. Batches take longer by nature."""

    shed_share: float = 0.0
    """Share of requests that were refused because there were too many."""

    open_breakers: float = 0.0
    """Share of breakers that are open. One that is half-open may be tried."""

    pool_use: float = 0.0
    """Share of the connections there may be that are in use."""

    cpu: float = 0.0
    """Share of the machine's, or the container's, CPU time that is used."""

    memory: float = 0.0
    """Share of the machine's, or the container's, memory that is used."""

    writes_down: bool = False
    """Nothing can be stored where it can be read: a full disk. A primary that is gone is something else."""

    def with_calls(self, *, answered: int, failed: int, shed: int, p99_latency_s: float) -> "Vitals":
        """The same with the shares of a period's calls.

        `failed` are those of which `common.breaker.speaks_of_callee` says so, `answered` all others that were made,
        `shed` what a limiter refused. What a breaker, a level or somebody's own limit refused belongs in none of them.
        """
        calls = answered + failed
        judged = calls >= MIN_CALLS
        return replace(
            self,
            error_rate=failed / calls if judged else 0.0,
            p99_latency_s=p99_latency_s if judged else 0.0,
            shed_share=shed / (calls + shed) if calls + shed >= MIN_CALLS else 0.0,
        )


def of_cluster(own: Vitals, shards: Collection[Vitals]) -> Vitals:
    """The cluster's vitals, seen by a router: what is wrong with it is wrong with most shards, or with the router.

    `own` is the router: its CPU and memory, and what it sheds by itself. Its own errors, latency and breakers are mixed
    from all shards', and not looked at. Instead each is one that more than half of the shards, and at least two, have
    reached: one shard alone never counts, and in a cluster of one shard it is that shard's level which says how it is.

    Writes that are down are no figure of the cluster's: where they work they are taken, however many shards refuse
    theirs. All are refused only by an operator.
    """
    return replace(
        own,
        error_rate=_common(shard.error_rate for shard in shards),
        p99_latency_s=_common(shard.p99_latency_s for shard in shards),
        shed_share=max(own.shed_share, _common(shard.shed_share for shard in shards)),
        open_breakers=_common(shard.open_breakers for shard in shards),
        writes_down=False,
    )


def _common(figures: Iterable[float]) -> float:
    ordered = sorted(figures, reverse=True)
    needed = max(2, len(ordered) // 2 + 1)
    return ordered[needed - 1] if needed <= len(ordered) else 0.0
