"""Looks at primaries whose breakers are not closed: one that answers again is asked again at once.

Replicas are looked at all the time (`router.replicas`). A primary is only when something has gone wrong with it: as
long as nothing has, the calls to it say all there is to know.
"""

import asyncio

from common import logs
from common.errors import DeadlineExceeded, MemshardError
from common.topology import Shard
from router.shards import Shards
from router.topology_watch import TopologyWatch

_log = logs.get_logger("probes")

# With the second that a channel takes to come back at most, calls reach a primary within two seconds of its return.
_EVERY_S = 0.25
# Looks in a row without any answer after which there is a new connection, and again after twice as many. The other end
# of the old one may be gone without a word, which TCP finds out after minutes.
_SILENT = 2


class Probes:
    """Asks primaries in trouble how they are. `run` does it until cancelled."""

    def __init__(self, shards: Shards, watch: TopologyWatch) -> None:
        self._shards = shards
        self._watch = watch
        self._silent: dict[str, int] = {}

    async def run(self) -> None:
        """Looks again and again. No look lasts longer than the time between two."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            async with asyncio.TaskGroup() as group:
                for shard in self._watch.topology.shards:
                    if self._shards.guards.of(shard.shard_id).troubled:
                        group.create_task(self._look(shard))
            await asyncio.sleep(max(0.0, began + _EVERY_S - loop.time()))

    async def _look(self, shard: Shard) -> None:
        """Health first, which says whether the service has a database that takes writes; then a question that goes
        through that database, so that one that hangs is not taken for well."""
        said = None
        try:
            if await self._shards.is_serving(shard.address, timeout_s=_EVERY_S):
                said = await self._shards.describe(shard.address, shard.shard_id, timeout_s=_EVERY_S)
        except DeadlineExceeded:
            self._heard_nothing(shard)
            return
        except MemshardError:
            pass  # A refusal is an answer too, if not one that helps.
        except Exception as bug:
            # The looks at all others, and the router with them, would end.
            _log.error("a look at a primary failed by a bug", **logs.describe_bug(bug))
            return
        self._silent.pop(shard.shard_id, None)
        if said is not None and said.shard_id == shard.shard_id:
            self._shards.guards.of(shard.shard_id).heard()
            if said.cluster_id == self._watch.topology.cluster_id:
                self._shards.timelines.observe(said.shard_id, said.position.timeline)

    def _heard_nothing(self, shard: Shard) -> None:
        silent = self._silent[shard.shard_id] = self._silent.get(shard.shard_id, 0) + 1
        if silent % _SILENT == 0 and (silent // _SILENT).bit_count() == 1:
            self._shards.reconnect(shard.address)
