"""What is known of each replica of the topology: a look at each every quarter of a second, and what reads teach.

A look asks two things. Health first, since only the replica knows how far behind it may fall before it says
NOT_SERVING, and since it says so too before it leaves. Then Describe, for where it is; that answer goes through its
database, so that a replica whose standby hangs is found out as well.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from common import logs
from common.config import RouterSettings
from common.errors import DeadlineExceeded, MemshardError
from common.topology import Replica, Shard, Topology
from memshard.internal.v1 import shard_pb2
from router.balance import Standing
from router.consistency import Position, Wanted
from router.shards import Shards

_log = logs.get_logger("replicas")

# A busy machine lets one look go by now and then. That makes a replica suspect, and no more than that.
_LOST_AFTER_LOOKS = 2


@dataclass(slots=True)
class _Watched:
    """One replica, as far as it is known. `standing` is None while it does not serve."""

    shard: Shard
    replica: Replica
    standing: Standing | None = None
    suspected_at: float = 0.0
    heard_at: float = 0.0
    """When it last answered a read."""
    silent_looks: int = 0
    lag_ms: int | None = None
    """How old its data was when it last said so, whether it serves by now or not. None: it never has."""
    looked_at: bool = False
    """Whether a look has come to its end. Until then nothing can be said of it."""


class Replicas:
    """Knows which replicas serve, and how far they are. `run` keeps that fresh."""

    def __init__(self, shards: Shards, topology: Topology, settings: RouterSettings) -> None:
        self._shards = shards
        self._poll_s = settings.replica_poll_s
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._cluster_id = topology.cluster_id
        self.follow(topology)

    def follow(self, topology: Topology) -> None:
        """Takes up the replicas of a new topology. One that stays where it was stays known."""
        before = self._watched
        self._watched = {}
        for shard in topology.shards:
            for replica in shard.replicas:
                key = (shard.shard_id, replica.replica_id)
                known = before.get(key)
                if known is None or known.replica != replica:
                    known = _Watched(shard, replica)
                self._watched[key] = known

    def serving(self, shard: Shard) -> Mapping[str, Standing]:
        """What is known of the replicas of a shard that serve, by their ids."""
        return {
            watched.replica.replica_id: watched.standing for watched in self._of(shard) if watched.standing is not None
        }

    def has_looked_at(self, shard: Shard, replica: Replica) -> bool:
        """Whether it was ever found out how this replica is."""
        watched = self._watched.get((shard.shard_id, replica.replica_id))
        return watched is not None and watched.looked_at

    def all(self) -> list[tuple[str, str, bool, int | None]]:
        """Every replica: its shard's id, its own, whether it serves, and how many milliseconds old its data was when it
        last said so."""
        return [(*key, watched.standing is not None, watched.lag_ms) for key, watched in self._watched.items()]

    def answered(self, shard: Shard, replica: Replica, wanted: Wanted) -> None:
        """A replica has answered a read that asked for this."""
        if (watched := self._heard(shard, replica)) and watched.standing:
            watched.standing = watched.standing.proved(wanted)

    def refused(self, shard: Shard, replica: Replica, wanted: Wanted) -> None:
        """A replica has said that it is behind this."""
        if (watched := self._heard(shard, replica)) and watched.standing:
            watched.standing = watched.standing.refusing(wanted)

    def failed(self, shard: Shard, replica: Replica) -> None:
        """A replica has not answered a read: nobody else should wait for it before it has been heard of again."""
        if watched := self._watched.get((shard.shard_id, replica.replica_id)):
            self._suspect(watched)

    async def run(self) -> None:
        """Looks at all replicas, again and again, until cancelled. No look lasts longer than the time between two."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            async with asyncio.TaskGroup() as group:
                for watched in tuple(self._watched.values()):
                    group.create_task(self._look_to_the_end(watched))
            await asyncio.sleep(max(0.0, began + self._poll_s - loop.time()))

    async def _look_to_the_end(self, watched: _Watched) -> None:
        await self._look(watched)
        watched.looked_at = True

    async def _look(self, watched: _Watched) -> None:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._poll_s):
                said = await self._ask(watched)
        except (TimeoutError, DeadlineExceeded):
            if watched.heard_at > began:
                return  # It is busy, and so is this machine perhaps. What it answers it answers.
            watched.silent_looks += 1
            if watched.silent_looks >= _LOST_AFTER_LOOKS:
                self._lost(watched, "silent")
            else:
                self._suspect(watched)
            return
        except MemshardError as error:
            self._lost(watched, error.reason)
            return
        except Exception as bug:
            # The looks at all other replicas, and the router with them, would end.
            _log.error("a look at a replica failed by a bug", **logs.describe_bug(bug))
            self._lost(watched, "bug")
            return
        watched.silent_looks = 0
        if said is not None:
            watched.lag_ms = said.lag_ms
        if said is None:
            self._lost(watched, "not serving")
        elif watched.standing is not None and watched.suspected_at > began:
            return  # What was left unanswered came after what was just answered: the next look decides.
        else:
            self._shards.guards.of(watched.shard.shard_id, watched.replica.replica_id).heard()
            position = Position(said.position.timeline, said.position.lsn)
            if watched.standing is None:
                _log.info("a replica serves", **_names(watched), lag_ms=said.lag_ms)
                watched.standing = Standing(position, said.lag_ms)
            else:
                watched.standing = watched.standing.looked(position, said.lag_ms)

    async def _ask(self, watched: _Watched) -> shard_pb2.DescribeResponse | None:
        """What a replica says of itself; None when it does not serve, or is no replica of this shard any more."""
        if not await self._shards.is_serving(watched.replica.address, timeout_s=self._poll_s):
            return None
        said = await self._shards.describe(watched.replica.address, watched.replica.replica_id, timeout_s=self._poll_s)
        known = (said.cluster_id, said.shard_id) == (self._cluster_id, watched.shard.shard_id)
        if known:
            # One that has been promoted says so here before the topology does.
            self._shards.timelines.observe(said.shard_id, said.position.timeline)
        # One that takes writes has been promoted: the shard's own service answers for that server now.
        return said if known and not said.writable else None

    def _suspect(self, watched: _Watched) -> None:
        watched.suspected_at = asyncio.get_running_loop().time()
        if watched.standing is not None:
            watched.standing = watched.standing.suspected()

    def _lost(self, watched: _Watched, why: str) -> None:
        if watched.standing is None:
            return
        _log.warning("a replica serves no more", **_names(watched), why=why)
        watched.standing = None
        # Its calls go elsewhere at once.
        self._shards.abandon(watched.replica.address)

    def _of(self, shard: Shard) -> list[_Watched]:
        keys = ((shard.shard_id, replica.replica_id) for replica in shard.replicas)
        return [watched for key in keys if (watched := self._watched.get(key)) is not None]

    def _heard(self, shard: Shard, replica: Replica) -> _Watched | None:
        """The replica that has just answered."""
        watched = self._watched.get((shard.shard_id, replica.replica_id))
        if watched is not None:
            watched.heard_at = asyncio.get_running_loop().time()
            watched.silent_looks = 0
        return watched


def _names(watched: _Watched) -> dict[str, str]:
    return {"shard_id": watched.shard.shard_id, "replica_id": watched.replica.replica_id}
