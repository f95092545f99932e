"""ClusterService, a router's part of it: how it is, what it counts, and what it tries when something is wrong."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp

from common import catalog, logs, postgres
from common.bearer import Bearer
from common.breaker import CircuitBreaker, State
from common.config import RouterSettings
from common.deadline import Deadline
from common.degradation import in_words, set_degradation
from common.errors import FailedPrecondition, InvalidArgument, Unavailable
from common.lifecycle import Listener, StartError
from common.move_message import message_of
from common.rpc import methods_of
from memshard.admin.v1 import cluster_pb2 as pb
from memshard.v1.memory_pb2 import DegradationLevel
from router.entrance import Entrance
from router.findings import Finding, Report
from router.guard import TALLY_S, Kind
from router.hedges import Hedges
from router.location import LocationCache
from router.monitor import Monitor
from router.observed import HALF_LIFE_S, Observed
from router.place import Placement
from router.recovery import Attempt, Outcome, Recovery
from router.replicas import Replicas
from router.retries import Retries
from router.shards import Shards
from router.topology_watch import TopologyWatch

SERVICE = pb.DESCRIPTOR.services_by_name["ClusterService"]

_log = logs.get_logger("admin")

_NO_CATALOG = (postgres.DatabaseUnreachableError, catalog.CatalogError, *postgres.CONNECT_ERRORS)
# What is kept of the caller's time, in which to say that the catalog does not answer.
_WAY_BACK_S = 0.25

# A look at everything takes as long as it takes to cut two checks off.
_DEFAULT_DEADLINE_S = 30.0

_HOT_USERS = 10
_MOST_HOT_USERS = 100

_STATES = {
    State.CLOSED: pb.BREAKER_STATE_CLOSED,
    State.OPEN: pb.BREAKER_STATE_OPEN,
    State.HALF_OPEN: pb.BREAKER_STATE_HALF_OPEN,
}
_OUTCOMES = {
    Outcome.DONE: pb.RECOVERY_OUTCOME_DONE,
    Outcome.FAILED: pb.RECOVERY_OUTCOME_FAILED,
    Outcome.LIMITED: pb.RECOVERY_OUTCOME_LIMITED,
}


def read_token(file: Path) -> str:
    """The token that calls have to bring. Raises StartError."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"admin_token_file {file} cannot be read: {type(error).__name__}") from error
    if not token:
        raise StartError(f"admin_token_file {file} is empty: write a secret into it")
    return token


def listener(settings: RouterSettings, servicer: "AdminServicer") -> Listener | None:
    """The port that operators call; None when the settings name none. Raises StartError."""
    if settings.admin_port is None or settings.admin_token_file is None:
        return None
    bearer = Bearer(read_token(settings.admin_token_file))
    methods = methods_of(SERVICE, servicer, default_deadline_s=_DEFAULT_DEADLINE_S, authorise=bearer.require)
    return Listener(settings, [methods], host=settings.admin_host, port=settings.admin_port)


@dataclass(frozen=True, slots=True)
class AdminServicer:
    """The router's side of memshard.admin.v1.ClusterService."""

    monitor: Monitor
    recovery: Recovery
    watch: TopologyWatch
    shards: Shards
    retries: Retries
    hedges: Hedges
    locations: LocationCache
    replicas: Replicas
    observed: Observed
    placement: Placement
    entrance: Entrance
    catalog_dsn: str = field(repr=False)
    started_at: float = field(default_factory=time.monotonic)

    async def GetHealth(self, request: pb.GetHealthRequest, deadline: Deadline) -> pb.GetHealthResponse:
        look = request.fresh or not self.monitor.is_complete
        report = await self.monitor.look() if look else self.monitor.report()
        return pb.GetHealthResponse(report=_report(report))

    async def Recover(self, request: pb.RecoverRequest, deadline: Deadline) -> pb.RecoverResponse:
        before = await self.monitor.look()
        attempts = await self.recovery.recover(before)
        response = pb.RecoverResponse(attempts=map(_attempt, attempts), before=_report(before))
        if request.test_after:
            response.after.CopyFrom(_report(await self.monitor.look()))
        return response

    async def GetStats(self, request: pb.GetStatsRequest, deadline: Deadline) -> pb.GetStatsResponse:
        entries, most = self.locations.size
        return pb.GetStatsResponse(
            epoch=self.watch.topology.epoch,
            uptime_s=time.monotonic() - self.started_at,
            breakers=self._breakers(),
            retries=pb.RetryStats(budget_left=self.retries.budget.balance()),
            hedges=pb.HedgeStats(sent=self.hedges.sent),
            limits=self._limits(),
            levels=self._levels(),
            cache=pb.CacheStats(entries=entries, max_entries=most, believed=self.locations.is_believed),
            recoveries=map(_attempt, self.recovery.log),
            shards=self._shards(),
            servers=self._servers(),
            requests_per_s=self.observed.requests_per_s,
            entrance=pb.EntranceStats(shed=self.entrance.shed_ever),
            moves=self._moves(),
            moves_age_s=self.watch.moving.age_s,
        )

    async def GetHotUsers(self, request: pb.GetHotUsersRequest, deadline: Deadline) -> pb.GetHotUsersResponse:
        if not 0 <= request.most <= _MOST_HOT_USERS:
            raise InvalidArgument.field("most", "OUT_OF_RANGE", f"must be 0 to {_MOST_HOT_USERS}")
        hitters, total = self.observed.hot_users(request.most or _HOT_USERS)
        users = []
        for hitter in hitters:
            operation, user = hitter.item
            slot = self.placement.user_slot(user)
            users.append(
                pb.HotUser(
                    user=user if request.names else self.observed.hashed(user),
                    operation=operation,
                    calls=hitter.count,
                    too_many=hitter.error,
                    share=hitter.count / total,
                    shard_id=self.watch.topology.owner(slot).shard_id if slot is not None else "",
                )
            )
        return pb.GetHotUsersResponse(users=users, half_life_s=HALF_LIFE_S)

    async def SetDegradation(self, request: pb.SetDegradationRequest, deadline: Deadline) -> pb.SetDegradationResponse:
        try:
            async with deadline.less(_WAY_BACK_S).bound():
                connection = await postgres.connect(self.catalog_dsn, what="the catalog")
                try:
                    answer = await set_degradation(connection, request)
                finally:
                    connection.terminate()
        except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError) as error:
            raise FailedPrecondition(
                "this router's role may not set levels in the catalog; `memshard catalog create` lets memshard_app",
                reason="CATALOG_READ_ONLY",
            ) from error
        except _NO_CATALOG as error:
            raise Unavailable("the catalog does not answer", reason="CATALOG_UNAVAILABLE", retry_after_s=1.0) from error
        whose, level = in_words(request)
        _log.warning("an operator has set a degradation level", of=whose, level=level)
        return answer

    def _shards(self) -> Iterable[pb.ShardStats]:
        topology = self.watch.topology
        for shard in topology.shards:
            yield pb.ShardStats(
                shard_id=shard.shard_id, status=shard.status.value, slots=topology.slot_count(shard.shard_id)
            )

    def _moves(self) -> Iterable[pb.MoveStats]:
        for seen in self.watch.moving.progress.open:
            yield pb.MoveStats(move=message_of(seen.move), stopped=seen.is_stopped)

    def _servers(self) -> Iterable[pb.ServerStats]:
        for shard in self.watch.topology.shards:
            standings = self.replicas.serving(shard)
            for replica_id in (None, *(replica.replica_id for replica in shard.replicas)):
                guard = self.shards.guards.of(shard.shard_id, replica_id)
                standing = standings.get(replica_id) if replica_id else None
                tally = guard.tally
                failed = tally.failed.total()
                yield pb.ServerStats(
                    server=guard.name,
                    shard_id=shard.shard_id,
                    replica_id=replica_id or "",
                    serving=standing is not None if replica_id else not any(map(guard.fails, Kind)),
                    lag_ms=standing.lag_ms if standing else 0,
                    calls_per_s=(tally.answered.total() + failed) / TALLY_S,
                    errors_per_s=failed / TALLY_S,
                    p50_ms=(tally.latency.quantile(0.5) or 0) * 1000,
                    p99_ms=(tally.latency.quantile(0.99) or 0) * 1000,
                    in_flight=guard.limiter.in_flight,
                )

    def _breakers(self) -> Iterable[pb.BreakerStats]:
        for guards in self.shards.guards.by_shard().values():
            for guard in guards.values():
                for kind, breaker in guard.breakers.items():
                    yield _breaker(breaker, kind.value)
        for breaker in self.shards.levels.dependencies:
            yield _breaker(breaker, "all")

    def _limits(self) -> Iterable[pb.LimitStats]:
        for guards in self.shards.guards.by_shard().values():
            for guard in guards.values():
                limiter = guard.limiter
                yield pb.LimitStats(server=guard.name, limit=limiter.limit, in_flight=limiter.in_flight)

    def _levels(self) -> Iterable[pb.LevelStats]:
        levels = self.shards.levels
        for name, vitals in sorted(levels.vitals.items()):
            decider = levels.decider(name)
            yield pb.LevelStats(
                shard_id=name,
                level=DegradationLevel.ValueType(decider.level),
                set_by_operator=decider.override is not None,
                error_rate=vitals.error_rate,
                p99_latency_ms=vitals.p99_latency_s * 1000,
                shed_share=vitals.shed_share,
                open_breakers_share=vitals.open_breakers,
                pool_use=vitals.pool_use,
                cpu=vitals.cpu,
                memory=vitals.memory,
                writes_down=vitals.writes_down,
            )


def _breaker(breaker: CircuitBreaker, kind: str) -> pb.BreakerStats:
    return pb.BreakerStats(callee=breaker.name, kind=kind, state=_STATES[breaker.state])


def _report(report: Report) -> pb.HealthReport:
    return pb.HealthReport(overall=pb.Condition.ValueType(report.overall), checks=map(_check, report.findings))


def _check(finding: Finding) -> pb.Check:
    return pb.Check(
        name=finding.name,
        subject=finding.subject,
        condition=pb.Condition.ValueType(finding.condition),
        figure=finding.figure,
        unit=finding.unit,
        message=finding.message,
        check_time=_timestamp(finding.at),
    )


def _attempt(attempt: Attempt) -> pb.RecoveryAttempt:
    return pb.RecoveryAttempt(
        time=_timestamp(attempt.at),
        action=attempt.action.kind.value,
        subject=attempt.action.subject,
        reason=attempt.action.reason,
        outcome=_OUTCOMES[attempt.outcome],
        message=attempt.message,
    )


def _timestamp(seconds: float) -> Timestamp:
    made = Timestamp()
    made.FromMicroseconds(round(seconds * 1e6))
    return made
