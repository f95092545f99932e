"""ClusterService: how `memshard failover` and its kin reach the supervisor. Loopback, and a token in a private file."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import grpc.aio

from common import errors
from common.bearer import Bearer
from common.deadline import Deadline
from common.level import Level
from common.rpc import generic_handler
from local.cluster import Plan
from local.degradation import set_level
from local.errors import LocalClusterError
from local.planned_failover import PlannedFailover, Progress, Step
from local.ports import HOST
from local.process import Child
from local.rolling import Restarted, RollingRestart
from local.shard_servers import ShardServers
from local.streaming import Streaming, Tell
from memshard.admin.v1 import cluster_pb2

_STOP_GRACE_S = 0.2
_DEFAULT_DEADLINE_S = 30.0

_STEPS = {
    Step.CHECKED: cluster_pb2.FAILOVER_STEP_CHECKED,
    Step.STOPPED: cluster_pb2.FAILOVER_STEP_STOPPED,
    Step.RECORDED: cluster_pb2.FAILOVER_STEP_RECORDED,
    Step.PROMOTED: cluster_pb2.FAILOVER_STEP_PROMOTED,
    Step.REJOINED: cluster_pb2.FAILOVER_STEP_REJOINED,
}

_SERVICE = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"]


@asynccontextmanager
async def serving(  # What there is to administer.
    port: int,
    token: str,
    plan: Plan,
    shards: Mapping[str, ShardServers],
    processes: Callable[[], Sequence[Child]],
    log: logging.Logger,
) -> AsyncIterator[None]:
    """Serves until the end of the block. Raises LocalClusterError when the port cannot be had."""
    bearer = Bearer(token)
    failovers = Streaming(bearer, log, cluster_pb2.FailoverRequest, _Failovers(shards).run)
    rolling = RollingRestart(processes, shards, log)
    restarts = Streaming(bearer, log, cluster_pb2.RestartRequest, _Restarts(rolling).run)
    streams = grpc.method_handlers_generic_handler(
        _SERVICE.full_name, {"Failover": failovers.handler(), "Restart": restarts.handler()}
    )
    answers = generic_handler(
        _SERVICE, _Answers(plan, log), default_deadline_s=_DEFAULT_DEADLINE_S, authorise=bearer.require
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    # The first handler that knows an rpc has it.
    server.add_generic_rpc_handlers([streams, answers])
    try:
        server.add_insecure_port(f"{HOST}:{port}")
    except RuntimeError as error:
        raise LocalClusterError(f"port {port} is in use by something else; start again") from error
    await server.start()
    try:
        yield
    finally:
        await server.stop(_STOP_GRACE_S)
        await failovers.close()
        await restarts.close()


class _Answers:
    """The rpcs with one answer each."""

    def __init__(self, plan: Plan, log: logging.Logger) -> None:
        self._plan = plan
        self._log = log

    async def SetDegradation(  # noqa: N802  # As the rpc is called.
        self, request: cluster_pb2.SetDegradationRequest, deadline: Deadline
    ) -> cluster_pb2.SetDegradationResponse:
        try:
            level = Level(request.level) if request.level else None
        except ValueError as error:
            raise errors.InvalidArgument.field("level", "INVALID_ENUM", "is no degradation level") from error
        try:
            epoch = await set_level(self._plan, request.shard_id, level)
        except LocalClusterError as error:
            raise errors.Unavailable(str(error), reason="CATALOG_UNAVAILABLE") from error
        told = level.name.lower() if level else "auto"
        self._log.warning("the degradation level of %s was set to %s", request.shard_id or "the cluster", told)
        return cluster_pb2.SetDegradationResponse(epoch=epoch)


class _Failovers:
    """Failover, which tells each step."""

    def __init__(self, shards: Mapping[str, ShardServers]) -> None:
        self._shards = shards

    async def run(self, request: cluster_pb2.FailoverRequest, tell: Tell) -> None:
        """Raises MemshardError, LocalClusterError."""
        shard = self._shards.get(request.shard_id)
        if shard is None:
            known = ", ".join(self._shards)
            raise errors.NotFound(f"there is no shard {request.shard_id!r}, only {known}", reason="SHARD_NOT_FOUND")
        await PlannedFailover(shard, lambda progress: tell(_message(progress))).run(request.to_server or None)


class _Restarts:
    """Restart, which tells each process."""

    def __init__(self, rolling: RollingRestart) -> None:
        self._rolling = rolling

    async def run(self, request: cluster_pb2.RestartRequest, tell: Tell) -> None:
        """Raises LocalClusterError."""

        def told(one: Restarted) -> None:
            message = f"{one.name} ({one.role}) has been restarted"
            tell(cluster_pb2.RestartProgress(name=one.name, message=message, seconds=one.seconds))

        await self._rolling.run(list(request.names), told)


def _message(progress: Progress) -> cluster_pb2.FailoverProgress:
    return cluster_pb2.FailoverProgress(
        step=_STEPS[progress.step],
        message=progress.message,
        old_primary=progress.old,
        new_primary=progress.new,
    )
