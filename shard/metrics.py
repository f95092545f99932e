"""What a shard looks up for `/metrics`."""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from common.breaker_log import ALL, states_of
from common.embedder import Embedder
from shard.commits import Commits
from shard.database import Database
from shard.disk import Disk
from shard.durability import Durability
from shard.figures import FiguresWatch
from shard.large_users.known import OwnIndexes
from shard.primary import Primary


@dataclass(frozen=True, slots=True)
class ShardMetrics:
    """Looks at a shard's parts."""

    shard_id: str
    database: Database
    commits: Commits
    durability: Durability
    primary: Primary
    disk: Disk
    figures: FiguresWatch
    own_indexes: OwnIndexes
    embedder: Embedder | None = None

    def look(self) -> Iterable[Metric]:
        """All of it."""
        yield from of_pool(self.shard_id, self.database)
        yield self._of("memory_primary_available", "1: there is a server that takes writes.", self.primary.is_available)
        yield self._of("memory_primary_timeline", "Timeline of the server that takes writes.", self.primary.timeline)
        yield self._of("memory_commits_in_flight", "Writes that have begun and not ended.", self.commits.count)
        yield from of_sync_set(self.shard_id, self.durability)
        if (figures := self.figures.figures) is not None:
            yield self._of("memory_store_size_bytes", "Size of the shard's database.", figures.size_bytes)
            yield self._of(
                "memory_embedding_queue_length",
                "Memories that wait for their embedding, 10,000 at most.",
                figures.waiting_for_embedding,
            )
        yield of_own_indexes(self.shard_id, self.own_indexes)
        if self.embedder is not None and self.embedder.breaker is not None:
            yield states_of([(self.embedder.breaker, ALL)])
        if (room := self.disk.room).size_bytes:
            yield self._of("memory_disk_size_bytes", "Size of the file system with the data.", room.size_bytes)
            yield self._of("memory_disk_free_bytes", "What is free of it.", room.free_bytes)

    def _of(self, name: str, documentation: str, value: float) -> Metric:
        return _gauge(self.shard_id, name, documentation, value)


def of_sync_set(shard_id: str, durability: Durability) -> Iterable[Metric]:
    """Whom commits wait for. Where whoever runs PostgreSQL keeps that, only receipts say whether they wait."""
    if not durability.is_external:
        yield _gauge(
            shard_id,
            "memory_sync_set_members",
            "Standbys of which commits wait for a quorum.",
            len(durability.members),
        )


def of_own_indexes(shard_id: str, own_indexes: OwnIndexes) -> Metric:
    """The large users' own indexes that can be used, of a shard or of a replica."""
    family = GaugeMetricFamily(
        "memory_own_indexes",
        "Large users' own indexes: proven as good as an exact search, or for the level reduced alone.",
        labels=["shard", "use"],
    )
    family.add_metric([shard_id, "proven"], own_indexes.proven)
    family.add_metric([shard_id, "reduced"], own_indexes.count - own_indexes.proven)
    family.add_metric([shard_id, "shared"], own_indexes.shared is not None)
    return family


def of_pool(shard_id: str, database: Database) -> Iterable[Metric]:
    """How the connections to a database are used: of a shard, and of a replica."""
    size, in_use = database.use()
    usage = GaugeMetricFamily(
        "connection_pool_usage", "Share of the connections to the database that is in use.", labels=["shard"]
    )
    usage.add_metric([shard_id], in_use / size)
    open_now = GaugeMetricFamily(
        "active_memory_connections", "Connections to the database that are open.", labels=["shard"]
    )
    open_now.add_metric([shard_id], database.open_connections)
    return usage, open_now


def _gauge(shard_id: str, name: str, documentation: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=["shard"])
    family.add_metric([shard_id], value)
    return family
