"""What a router looks up for `/metrics`: the state of what guards it, of what it knows, and of what it remembers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from common.breaker import CircuitBreaker
from common.breaker_log import ALL, states_of
from common.level import Level
from common.moves import Step
from common.topology import CLUSTER
from router.hedges import Hedges
from router.observed import Observed
from router.remembered import Remembered
from router.replicas import Replicas
from router.retries import Retries
from router.shards import Shards
from router.topology_watch import TopologyWatch

CLUSTER_NAME = "cluster"
"""Stands for the whole where a metric names a shard."""

# Seconds after which what the catalog told of moves is told no more: it is read every five, and may be away for a few.
_MOVES_HOLD_S = 60.0


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Looks at a router's parts."""

    watch: TopologyWatch
    shards: Shards
    replicas: Replicas
    retries: Retries
    hedges: Hedges
    remembered: Remembered
    observed: Observed

    def look(self) -> Iterable[Metric]:
        """All of it."""
        yield from self._topology()
        yield from self._guards()
        yield from self._levels()
        yield from self._replicas()
        yield from self._cache()
        yield from self._moves()
        yield _gauge(
            "memory_retry_budget_available", "Retries that there may be at once.", self.retries.budget.balance()
        )
        hedges = CounterMetricFamily("memory_hedges", "Reads that were asked of a second server.")
        hedges.add_metric([], self.hedges.sent)
        yield hedges
        yield _gauge(
            "agent_query_frequency", "Reads a second, over the last minute, of all agents.", self.observed.queries_per_s
        )
        yield _gauge(
            "active_memory_connections", "Channels that are open to shards and replicas.", self.shards.channel_count
        )

    def _topology(self) -> Iterable[Metric]:
        topology = self.watch.topology
        yield _gauge("memory_topology_epoch", "Epoch of the topology that this router routes by.", topology.epoch)
        slots = GaugeMetricFamily("memory_shard_slots", "Slots of a shard, by the topology.", labels=["shard"])
        for shard in topology.shards:
            slots.add_metric([shard.shard_id], topology.slot_count(shard.shard_id))
        yield slots

    def _moves(self) -> Iterable[Metric]:
        moving = self.watch.moving
        if moving.age_s is None or moving.age_s > _MOVES_HOLD_S:
            return
        progress = moving.progress
        counts = Counter(progress.ended)
        counts.update(seen.move.step for seen in progress.open)
        moves = GaugeMetricFamily("memory_moves", "Moves of slots that the catalog knows, by step.", labels=["step"])
        for step in Step:
            moves.add_metric([step.value], counts[step])
        yield moves
        yield _gauge(
            "memory_moves_unattended",
            "Moves that have stopped before their end, and that nobody drives.",
            sum(seen.is_stopped for seen in progress.open),
        )
        now = datetime.now(UTC)
        yield _gauge(
            "memory_moves_overdue",
            "Moves that wait to be cleaned up, though their time to be brought back is over.",
            sum(seen.move.is_overdue(now) for seen in progress.open),
        )
        slots = GaugeMetricFamily(
            "memory_moving_slots",
            "Slots of moves that are not over, of the shard that they go from (out) and to (in).",
            labels=["shard", "direction"],
        )
        for shard in self.watch.topology.shards:
            out = sum(seen.move.slots for seen in progress.open if seen.move.source == shard.shard_id)
            coming = sum(seen.move.slots for seen in progress.open if seen.move.target == shard.shard_id)
            slots.add_metric([shard.shard_id, "out"], out)
            slots.add_metric([shard.shard_id, "in"], coming)
        yield slots

    def _guards(self) -> Iterable[Metric]:
        breakers: list[tuple[CircuitBreaker, str]] = []
        limits = GaugeMetricFamily(
            "memory_server_call_limit", "Calls that a server may have at once.", labels=["server"]
        )
        in_flight = GaugeMetricFamily("memory_server_calls_in_flight", "Calls that it has now.", labels=["server"])
        for guards in self.shards.guards.by_shard().values():
            for guard in guards.values():
                breakers += [(breaker, kind.value) for kind, breaker in guard.breakers.items()]
                limits.add_metric([guard.name], guard.limiter.limit)
                in_flight.add_metric([guard.name], guard.limiter.in_flight)
        breakers += [(breaker, ALL) for breaker in self.shards.levels.dependencies]
        return states_of(breakers), limits, in_flight

    def _levels(self) -> Iterable[Metric]:
        active = GaugeMetricFamily(
            "degradation_mode_active", "1: this is the level of the shard, or of the cluster.", labels=["of", "level"]
        )
        pools = GaugeMetricFamily(
            "memory_shard_pool_usage", "Share of a shard's connections in use, as it last told.", labels=["shard"]
        )
        levels = self.shards.levels
        for name in (CLUSTER, *(shard.shard_id for shard in self.watch.topology.shards)):
            in_force = levels.decider(name).level
            for level in Level:
                active.add_metric([name or CLUSTER_NAME, level.name.lower()], level is in_force)
        for shard in self.watch.topology.shards:
            if (share := levels.pool_use.get(shard.shard_id)) is not None:
                pools.add_metric([shard.shard_id], share)
        return active, pools

    def _replicas(self) -> Iterable[Metric]:
        serving = GaugeMetricFamily(
            "memory_replica_serving", "1: the replica is asked for reads.", labels=["shard", "replica"]
        )
        lag = GaugeMetricFamily(
            "replication_lag_seconds", "How old a replica's data was when it last said so.", labels=["shard", "replica"]
        )
        for shard_id, replica_id, serves, lag_ms in self.replicas.all():
            serving.add_metric([shard_id, replica_id], serves)
            if lag_ms is not None:
                lag.add_metric([shard_id, replica_id], lag_ms / 1000)
        return serving, lag

    def _cache(self) -> Iterable[Metric]:
        locations, memories = self.remembered.locations, self.remembered.memories
        entries, most = locations.size
        yield _gauge("memory_cache_entries", "Locations that this router remembers.", entries)
        yield _gauge("memory_cache_max_entries", "Locations that it may remember.", most)
        yield _gauge("memory_cache_believed", "1: what it remembers is used.", locations.is_believed)
        kept, size_bytes, most_bytes = memories.size
        yield _gauge("memory_cached_memories", "Memories that this router remembers.", kept)
        yield _gauge("memory_cached_bytes", "Bytes that they take.", size_bytes)
        yield _gauge("memory_cached_max_bytes", "Bytes that they may take.", most_bytes)
        searches, search_bytes = self.remembered.searches.size
        yield _gauge("memory_cached_searches", "Searches whose results this router remembers.", searches)
        yield _gauge("memory_cached_search_bytes", "Bytes that these take.", search_bytes)
        ratio = GaugeMetricFamily(
            "memory_cache_hit_ratio",
            "Share of looks into a layer of the caches that found something, over the last five minutes.",
            labels=["layer"],
        )
        embeddings = self.remembered.embeddings
        for layer in (
            *locations.layers,
            memories.layer,
            self.remembered.memories_redis.layer,
            self.remembered.searches.layer,
            *((embeddings.layer, embeddings.layer_redis) if embeddings is not None else ()),
        ):
            if (share := layer.hit_ratio) is not None:
                ratio.add_metric([layer.name], share)
        yield ratio


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
