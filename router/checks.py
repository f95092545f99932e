"""What the health monitor asks, how often, and from which figures on something is no longer well."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from common import catalog, postgres
from common.breaker import BREAKER_OPEN, State
from common.catalog import Cluster
from common.deadline import Deadline
from common.embedder import Embedder
from common.errors import (
    DeadlineExceeded,
    MemshardError,
    OutcomeUnknown,
    ReadOnly,
    ResourceExhausted,
    Unavailable,
    WrongShard,
)
from common.level import Level
from common.machine import Busy
from common.topology import Replica, Shard, ShardStatus, server_name
from memshard.internal.v1.shard_pb2 import DescribeResponse
from router.findings import Condition, Finding, Scale
from router.guard import Kind
from router.location import LocationCache
from router.monitor import Check
from router.replicas import Replicas
from router.shards import SHARD_MAINTENANCE, Shards
from router.synthetic import Synthetic
from router.topology_watch import TopologyWatch

_MS = "ms"
_SHARE = "share"

# Often enough for a level, which is entered after five seconds, to be decided by more than one look at a pool.
_DATABASE_EVERY_S = 2.0
_DATABASE_CUT_OFF_S = 2.0
# Milliseconds in which none of all connections, each in use, answers: longer than any statement here takes. Then it is
# no peak, and new ones may help.
_SILENT_MS = 5_000
# How a round ends that waited for a connection in vain, or that was not made since so many others had.
_TOO_LATE = frozenset({DeadlineExceeded.default_reason, OutcomeUnknown.default_reason, BREAKER_OPEN})
# As often as replicas are looked at: what is known of them costs nothing to ask, and they come and go by themselves.
_REPLICA_EVERY_S = 0.25
# As often as levels are decided; nobody is asked for it.
_CALLS_EVERY_S = 1.0
_SYNTHETIC_EVERY_S = 10.0
# As long as a call takes that meets a standby which is just being lost: two seconds, and then some.
_SYNTHETIC_CUT_OFF_S = 5.0
_HELPER_EVERY_S = 5.0
# One text in ten seconds is all that a server of embeddings is asked for because of this.
_EMBEDDER_EVERY_S = 10.0
_HELPER_CUT_OFF_S = 2.0
_EMBEDDER_CUT_OFF_S = 5.0

# Half of the way to the 30 s after which a replica says by itself that it does not serve.
LAG = Scale(degraded=15_000.0)
# All but one of twenty, as in common/level.py.
POOL = Scale(degraded=0.95)
# PostgreSQL stops at a full disk. A tenth is time to act, a twentieth is hardly any.
DISK = Scale(degraded=0.10, unhealthy=0.05, falling=True)


# Where the cluster gives something up (common/level.py), but for the latency: what is merely not quick wakes nobody.
ERRORS = Scale(degraded=0.05, unhealthy=0.10)
LATENCY = Scale(degraded=500.0)
# One breaker of a shard or one of what all share, whichever it is.
BREAKERS = Scale(degraded=0.01)
LEVEL = Scale(degraded=Level.REDUCED, unhealthy=Level.READONLY)


@dataclass(frozen=True, slots=True)
class Checks:
    """Everything that the router needs, as checks."""

    cluster: Cluster
    watch: TopologyWatch
    shards: Shards
    replicas: Replicas
    locations: LocationCache
    embedder: Embedder | None
    catalog_dsn: str
    full: set[str] = field(default_factory=set)
    """Shards that use all of their connections, which answer."""

    def now(self) -> list[Check]:
        """Those of the topology as it is now."""
        topology = self.watch.topology
        checks = [
            Check(
                "catalog",
                "",
                partial(_timed, "catalog", "", self._ask_catalog),
                _HELPER_EVERY_S,
                _HELPER_CUT_OFF_S,
                failed=Condition.DEGRADED,
            )
        ]
        if self.locations.is_shared:
            checks.append(
                Check(
                    "redis",
                    "",
                    partial(_timed, "redis", "", self.locations.ping),
                    _HELPER_EVERY_S,
                    _HELPER_CUT_OFF_S,
                    failed=Condition.DEGRADED,
                )
            )
        if self.embedder is not None:
            checks.append(
                Check(
                    "embedder",
                    "",
                    partial(_timed, "embedder", "", self._embed),
                    _EMBEDDER_EVERY_S,
                    _EMBEDDER_CUT_OFF_S,
                    failed=Condition.DEGRADED,
                )
            )
        checks.append(Check("calls", "", self._calls, _CALLS_EVERY_S, _HELPER_CUT_OFF_S))
        serving = {shard.shard_id for shard in topology.serving()}
        for shard in topology.shards:
            checks.append(self._database(shard))
            checks += [self._replica(shard, replica) for replica in shard.replicas]
            if shard.shard_id in serving:
                checks.append(self._synthetic(shard))
        return checks

    def _database(self, shard: Shard) -> Check:
        return Check(
            "database",
            shard.shard_id,
            partial(self._describe, shard),
            _DATABASE_EVERY_S,
            _DATABASE_CUT_OFF_S,
            # In maintenance it may be stopped on purpose: nothing is to be tried against that.
            failed=Condition.DEGRADED if shard.status is ShardStatus.MAINTENANCE else Condition.UNHEALTHY,
            beside=("pool", "disk"),
        )

    def _replica(self, shard: Shard, replica: Replica) -> Check:
        return Check(
            "replica",
            server_name(shard.shard_id, replica.replica_id),
            partial(self._lag, shard, replica),
            _REPLICA_EVERY_S,
            _HELPER_CUT_OFF_S,
            failed=Condition.DEGRADED,
        )

    def _synthetic(self, shard: Shard) -> Check:
        breaker = self.shards.guards.of(shard.shard_id).breakers[Kind.STORE]
        return Check(
            "synthetic",
            shard.shard_id,
            partial(self._round, shard),
            _SYNTHETIC_EVERY_S,
            _SYNTHETIC_CUT_OFF_S,
            eager=lambda: breaker.state is not State.CLOSED,
        )

    async def _describe(self, shard: Shard) -> Sequence[Finding]:
        """The shard's service and its database, and what it says of pool, disk and machine."""
        levels = self.shards.levels
        began = time.monotonic()
        try:
            said = await self.shards.describe(
                shard.address, shard.shard_id, timeout_s=_DATABASE_CUT_OFF_S, without_owned=True
            )
        except BaseException:
            # Of a shard that does not answer nothing is known. Until it does or does not, the last figure holds.
            levels.pool_use.pop(shard.shard_id, None)
            levels.busy.pop(shard.shard_id, None)
            self.full.discard(shard.shard_id)
            raise
        took_ms = (time.monotonic() - began) * 1000
        if said.shard_id != shard.shard_id or not (said.writable or said.database_silent_ms):
            raise Unavailable("somebody else answers there", reason="NOT_PRIMARY")
        database, pool = _of_database(said, took_ms), _of_pool(said)
        levels.busy[shard.shard_id] = Busy(said.cpu, said.memory)
        levels.pool_use.pop(shard.shard_id, None)
        if pool.figure is not None:
            levels.pool_use[shard.shard_id] = pool.figure
        self.full.discard(shard.shard_id)
        if pool.condition is Condition.DEGRADED and database.condition < Condition.UNHEALTHY:
            self.full.add(shard.shard_id)
        return [database, pool, _of_disk(said)]

    async def _lag(self, shard: Shard, replica: Replica) -> Sequence[Finding]:
        """What is known of the replica, which is looked at four times a second in any case."""
        name = server_name(shard.shard_id, replica.replica_id)
        standing = self.replicas.serving(shard).get(replica.replica_id)
        if standing is None and not self.replicas.has_looked_at(shard, replica):
            return [_unknown("replica", name, "has not been looked at yet")]
        if standing is None:
            return [Finding("replica", name, Condition.DEGRADED, message="does not serve")]
        lag_ms = float(standing.lag_ms)
        return [Finding("replica", name, LAG.condition(lag_ms), lag_ms, _MS)]

    async def _round(self, shard: Shard) -> Sequence[Finding]:
        topology = self.watch.topology
        if not topology.ranges_of(shard.shard_id):
            return [_unknown("synthetic", shard.shard_id, "owns no slots")]
        deadline = Deadline.after(_SYNTHETIC_CUT_OFF_S)
        began = time.monotonic()
        try:
            await Synthetic(self.cluster, self.shards).round(topology, shard, time.time(), deadline)
        except WrongShard as stale:
            await self.watch.refresh(stale.epoch, deadline)
            return [_unknown("synthetic", shard.shard_id, "its slots are moving")]
        except MemshardError as error:
            if (why := self._nothing_to_mend(shard, error)) is None:
                raise
            return [Finding("synthetic", shard.shard_id, Condition.DEGRADED, message=why)]
        took_ms = (time.monotonic() - began) * 1000
        return [Finding("synthetic", shard.shard_id, Condition.HEALTHY, took_ms, _MS)]

    def _nothing_to_mend(self, shard: Shard, error: MemshardError) -> str | None:
        """Why a round failed, where that is as it should be; None where it is not."""
        # By the shard's status in the catalog: somebody wants it so.
        if isinstance(error, ReadOnly):
            return "takes no writes, as it was set"
        if error.reason == SHARD_MAINTENANCE:
            return "in maintenance, as it was set"
        # It answers. To give it new connections as well would not help.
        if isinstance(error, ResourceExhausted) or (error.reason in _TOO_LATE and shard.shard_id in self.full):
            return "has too much to do"
        return None

    async def _ask_catalog(self) -> None:
        try:
            connection = await postgres.connect(self.catalog_dsn, what="the catalog")
            try:
                await catalog.read_epoch(connection)
            finally:
                connection.terminate()
        except (postgres.DatabaseUnreachableError, *postgres.CONNECT_ERRORS) as error:
            raise Unavailable("the catalog does not answer", reason="CATALOG_UNAVAILABLE") from error
        self.watch.breaker.probe_succeeded()

    async def _calls(self) -> Sequence[Finding]:
        """What the router has seen of its calls lately, and the level that it has come to by it."""
        levels = self.shards.levels
        findings: list[Finding] = []
        for name, vitals in levels.vitals.items():
            level = levels.decider(name).level
            findings += [
                _figure("errors", name, ERRORS, vitals.error_rate, _SHARE),
                _figure("latency", name, LATENCY, vitals.p99_latency_s * 1000, _MS),
                _figure("breakers", name, BREAKERS, levels.open_breakers(name), _SHARE),
                replace(_figure("level", name, LEVEL, float(level), "level"), message=level.name.lower()),
            ]
        return findings

    async def _embed(self) -> None:
        assert self.embedder is not None
        await self.embedder.probe(_EMBEDDER_CUT_OFF_S)


async def _timed(name: str, subject: str, ask: Callable[[], Awaitable[None]]) -> Sequence[Finding]:
    """Well, and how many milliseconds it took."""
    began = asyncio.get_running_loop().time()
    await ask()
    took_ms = (asyncio.get_running_loop().time() - began) * 1000
    return [Finding(name, subject, Condition.HEALTHY, took_ms, _MS)]


def _of_database(said: DescribeResponse, took_ms: float) -> Finding:
    if not said.database_silent_ms:
        return Finding("database", said.shard_id, Condition.HEALTHY, took_ms, _MS)
    if said.database_silent_ms < _SILENT_MS:
        return Finding("database", said.shard_id, Condition.DEGRADED, message="no connection to it is free")
    told = f"all connections are in use, and none has answered for {said.database_silent_ms / 1000:.0f} s"
    return Finding("database", said.shard_id, Condition.UNHEALTHY, message=told)


def _of_pool(said: DescribeResponse) -> Finding:
    if not said.pool_size:
        return _unknown("pool", said.shard_id)
    use = said.pool_in_use / said.pool_size
    told = f"{said.pool_in_use} of {said.pool_size} connections in use"
    return Finding("pool", said.shard_id, POOL.condition(use), use, _SHARE, told)


def _of_disk(said: DescribeResponse) -> Finding:
    if not said.disk_bytes:
        return _unknown("disk", said.shard_id)
    free = said.disk_free_bytes / said.disk_bytes
    told = f"{said.disk_free_bytes / 1024**3:.1f} GiB free"
    return Finding("disk", said.shard_id, DISK.condition(free), free, _SHARE, told)


def _figure(name: str, subject: str, scale: Scale, figure: float, unit: str) -> Finding:
    return Finding(name, subject, scale.condition(figure), figure, unit)


def _unknown(name: str, subject: str, why: str = "is not told") -> Finding:
    return Finding(name, subject, Condition.UNKNOWN, message=why)
