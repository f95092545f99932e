"""When a read that takes long is asked of a second server: a time for each shard and kind of read, and one budget."""

import time
from collections.abc import Callable

from common.hedge import HedgeBudget, HedgeTimer
from common.topology import Topology


class Hedges:
    """What the router knows of how long reads take, and how many of them it has asked twice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.sent = 0
        """Hedges since the start, for metrics."""
        self._clock = clock
        self._budget = HedgeBudget()
        self._timers: dict[tuple[str, str], HedgeTimer] = {}

    def read(self) -> None:
        """A read began that may be hedged, however many servers it will be sent to."""
        self._budget.read()

    def timer(self, shard_id: str, rpc: str) -> HedgeTimer:
        """How long reads of one kind take on the replicas of one shard."""
        key = shard_id, rpc
        if key not in self._timers:
            self._timers[key] = HedgeTimer(self._clock)
        return self._timers[key]

    def spend(self) -> bool:
        """Whether one more read may be asked twice now; it is counted as asked."""
        if not self._budget.spend():
            return False
        self.sent += 1
        return True

    def follow(self, topology: Topology) -> None:
        """Forgets the shards that are no more."""
        known = {shard.shard_id for shard in topology.shards}
        for key in [key for key in self._timers if key[0] not in known]:
            del self._timers[key]
