"""The degradation levels of the cluster and of each shard, looked at once a second; what they mean for calls.

`common.level` has the table of what each level does, and decides. Here is what it decides from, and where it takes
effect. A level is this router's own view. What an operator sets is the same for all: it comes with the topology.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import replace

from common import logs, tracing
from common.breaker import CircuitBreaker, State
from common.level import Effects, Level, LevelDecider
from common.machine import Busy, Machine
from common.topology import CLUSTER
from common.vitals import MIN_CALLS, Vitals, of_cluster
from common.window import SlidingCount
from router.guard import LATELY_S, Clock, Guard, Guards, Kind, Tally

_log = logs.get_logger("levels")

_EVERY_S = 1.0

_NAMES = {level: level.name.lower() for level in Level}
_IDLE = Busy(0.0, 0.0)


class Levels:
    """What is in force. `run` keeps it fresh."""

    def __init__(self, guards: Guards, clock: Clock = time.monotonic) -> None:
        self.dependencies: list[CircuitBreaker] = []
        """The breakers of what all shards share: Redis, the catalog, the embedder. Each has something that stands in,
        and nothing that a level gives up relieves one that is away; so they decide no level, and are told of."""
        self.shed = SlidingCount(1.0, LATELY_S, clock)
        """Requests that were refused because the router itself has too much to do."""
        self._guards = guards
        self._clock = clock
        self._deciders: dict[str, LevelDecider] = {CLUSTER: LevelDecider(clock)}
        self._told: dict[str, Level] = {}
        self.pool_use: dict[str, float] = {}
        """Share of each shard's connections in use, as the health monitor last heard."""
        self.busy: dict[str, Busy] = {}
        """How busy each shard's machine is, likewise."""
        self.vitals: dict[str, Vitals] = {}
        """The last look at each shard and, as CLUSTER, at the whole."""

    def decider(self, name: str) -> LevelDecider:
        """That of a shard, or of CLUSTER."""
        if name not in self._deciders:
            self._deciders[name] = LevelDecider(self._clock)
        return self._deciders[name]

    def of(self, shard_ids: Iterable[str] = ()) -> Level:
        """The level of an answer that these shards have a part in."""
        level = self._deciders[CLUSTER].level
        for shard_id in shard_ids:
            level = max(level, self.decider(shard_id).level)
        return level

    def tell_trace(self, shard_ids: Iterable[str] = ()) -> None:
        """Has the trace say at which level a call is answered: the cluster's, until it is known by which shards."""
        span = tracing.current()
        if span.is_recorded:
            span.set("memshard.degradation.level", _NAMES[self.of(shard_ids)])

    def effects(self, shard_id: str = CLUSTER) -> Effects:
        """What the levels of a shard and of the cluster do together."""
        whole = self._deciders[CLUSTER].effects
        return whole if shard_id == CLUSTER else whole.strictest(self.decider(shard_id).effects)

    def open_breakers(self, name: str) -> float:
        """The share of breakers that are open: of a shard, at the last look, or of CLUSTER, those of what all share, if
        that is more than most shards have."""
        of_shards = self.vitals[name].open_breakers
        return max(of_shards, _share_open(self.dependencies)) if name == CLUSTER else of_shards

    def override(self, levels: Mapping[str, Level]) -> None:
        """What an operator has set, by shard or CLUSTER; whatever is not named decides for itself again."""
        for name in {*levels, *self._deciders}:
            self.decider(name).override = levels.get(name)
        self._apply()

    def look(self, cpu: float = 0.0, memory: float = 0.0) -> None:
        """Takes one look at everything. `cpu` and `memory` are the shares of this machine's that are used, 0 to 1."""
        shards = {
            shard_id: self._with_what_it_told(shard_id, _of_shard(guards))
            for shard_id, guards in self._guards.by_shard().items()
        }
        for name in self._deciders.keys() - shards.keys() - {CLUSTER}:
            if self._deciders[name].override is None:
                del self._deciders[name]
        self.vitals = dict(shards)
        own = Vitals(cpu=cpu, memory=memory)
        calls = [guard.lately for guards in self._guards.by_shard().values() for guard in guards.values()]
        own = own.with_calls(
            answered=sum(tally.answered.total() for tally in calls),
            failed=0,
            shed=self.shed.total(),
            p99_latency_s=0.0,
        )
        self.vitals[CLUSTER] = of_cluster(own, list(shards.values()))
        for name, vitals in self.vitals.items():
            self.decider(name).observe(vitals)
        self._apply()

    async def run(self, changed: Callable[[Effects], Awaitable[None]]) -> None:
        """Looks until cancelled; `changed` hears what the cluster's level does after each look."""
        machine = Machine()
        while True:
            await asyncio.sleep(_EVERY_S)
            busy = machine.look()
            self.look(busy.cpu, busy.memory)
            await changed(self.effects())

    def _with_what_it_told(self, shard_id: str, seen: Vitals) -> Vitals:
        busy = self.busy.get(shard_id, _IDLE)
        return replace(seen, pool_use=self.pool_use.get(shard_id, 0.0), cpu=busy.cpu, memory=busy.memory)

    def _apply(self) -> None:
        for shard_id, guards in self._guards.by_shard().items():
            effects = self.effects(shard_id)
            for guard in guards.values():
                guard.limiter.patience = effects.patience
                guard.limiter.batch_share = guard.limiter.settings.batch_share * effects.batch_factor
        for name, decider in self._deciders.items():
            if (before := self._told.get(name, Level.NORMAL)) != decider.level:
                self._told[name] = decider.level
                log = _log.warning if decider.level > before else _log.info
                log("level", of=name or "cluster", before=before.name.lower(), after=decider.level.name.lower())


def _of_shard(guards: Mapping[str | None, Guard]) -> Vitals:
    """What this router sees of one shard; `guards` are those of its primary (None) and replicas."""
    tallies = [guard.lately for guard in guards.values()]
    vitals = Vitals(
        open_breakers=_share_open([b for guard in guards.values() for b in guard.breakers.values()]),
        writes_down=_writes_down(guards),
    )
    return vitals.with_calls(
        answered=sum(tally.answered.total() for tally in tallies),
        failed=sum(tally.failed.total() for tally in tallies),
        shed=sum(tally.shed.total() for tally in tallies),
        p99_latency_s=_slowest_s(tallies),
    )


def _slowest_s(tallies: Collection[Tally]) -> float:
    """What 99 of 100 calls take at the slowest server, of those that are asked enough to tell. Where none is, at the
    quickest: a shard is slow then only if all of its servers are.
    """
    known = [(tally.latency, p99) for tally in tallies if (p99 := tally.latency.quantile(0.99)) is not None]
    judged = [p99 for latency, p99 in known if latency.count >= MIN_CALLS]
    return max(judged) if judged else min((p99 for _, p99 in known), default=0.0)


def _writes_down(guards: Mapping[str | None, Guard]) -> bool:
    """Whether nothing can be stored, though the primary can be read, as when its disk is full.

    One that is gone is UNAVAILABLE instead, with replicas or without: it comes back or gets a successor, and writers do
    well to come back too.
    """
    primary = guards.get(None)
    return primary is not None and primary.fails(Kind.STORE) and primary.is_read


def _share_open(breakers: Collection[CircuitBreaker]) -> float:
    """The share that is open. One that is half-open may be tried, and as long as nobody does, it knows nothing."""
    if not breakers:
        return 0.0
    return sum(breaker.state is State.OPEN for breaker in breakers) / len(breakers)
