"""What a replica looks up for `/metrics`."""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from replica.lag import Probe
from shard.database import Database
from shard.large_users.known import OwnIndexes
from shard.metrics import of_own_indexes, of_pool


@dataclass(frozen=True, slots=True)
class ReplicaMetrics:
    """Looks at a replica's parts."""

    shard_id: str
    database: Database
    probe: Probe
    own_indexes: OwnIndexes

    def look(self) -> Iterable[Metric]:
        """All of it."""
        yield from of_pool(self.shard_id, self.database)
        yield of_own_indexes(self.shard_id, self.own_indexes)
        if (age_s := self.probe.age_s) is not None:
            lag = GaugeMetricFamily(
                "memory_replica_age_seconds", "How old the data of this standby is, by its own look.", labels=["shard"]
            )
            lag.add_metric([self.shard_id], age_s)
            yield lag
