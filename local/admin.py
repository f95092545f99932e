"""ClusterService: how `memshard failover` and its kin reach the supervisor. Loopback, and a token in a private file."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import grpc.aio
from google.protobuf.message import Message

from common import errors
from common.bearer import Bearer
from common.deadline import Deadline
from common.degradation import in_words, set_degradation
from common.methods import Methods
from common.rpc import methods_of
from local import admin_streams
from local.admin_moves import Moves
from local.cluster import Plan
from local.errors import LocalClusterError
from local.growth import Growth
from local.planned_failover import PlannedFailover, Progress, Step
from local.ports import HOST
from local.process import Child
from local.rolling import RollingRestart
from local.sessions import as_owner
from local.shard_servers import ShardServers
from memshard.admin.v1 import cluster_pb2

_STOP_GRACE_S = 0.2
_DEFAULT_DEADLINE_S = 30.0
_CATALOG_TIMEOUT_S = 10.0

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
    growth: Growth,
    processes: Callable[[], Sequence[Child]],
    log: logging.Logger,
) -> AsyncIterator[Moves]:
    """Serves until the end of the block. Raises LocalClusterError when the port cannot be had."""
    bearer = Bearer(token)
    failovers, moves = _Failovers(shards), Moves(plan, growth, log)
    restarts = _Restarts(RollingRestart(processes, shards, log))
    answers = methods_of(
        _SERVICE, _Answers(plan, moves, log), default_deadline_s=_DEFAULT_DEADLINE_S, authorise=bearer.require
    )
    failover: dict[str, tuple[type[Message], admin_streams.Stream]] = {
        "Failover": (cluster_pb2.FailoverRequest, failovers.stream)
    }
    restart: dict[str, tuple[type[Message], admin_streams.Stream]] = {
        "Restart": (cluster_pb2.RestartRequest, restarts.stream)
    }
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    streams = {
        **admin_streams.handlers(failover, bearer, log, unfinished="FAILOVER_UNFINISHED"),
        **admin_streams.handlers(restart, bearer, log, unfinished="RESTART_UNFINISHED"),
        **admin_streams.handlers(moves.streams(), bearer, log, unfinished="MOVE_UNFINISHED"),
    }
    Methods(answers.service, {**answers.handlers, **streams}).add_to(server)
    try:
        server.add_insecure_port(f"{HOST}:{port}")
    except RuntimeError as error:
        raise LocalClusterError(f"port {port} is in use by something else; start again") from error
    await server.start()
    try:
        yield moves
    finally:
        await server.stop(_STOP_GRACE_S)
        await failovers.close()
        await restarts.close()
        await moves.close()


class _Answers:
    """The rpcs with one answer each."""

    def __init__(self, plan: Plan, moves: Moves, log: logging.Logger) -> None:
        self._plan = plan
        self._moves = moves
        self._log = log

    async def ListShards(  # noqa: N802  # As the rpc is called, like those below.
        self, request: cluster_pb2.ListShardsRequest, deadline: Deadline
    ) -> cluster_pb2.ListShardsResponse:
        with _catalog_needed():
            return await self._moves.list_shards()

    async def ListMoves(  # noqa: N802
        self, request: cluster_pb2.ListMovesRequest, deadline: Deadline
    ) -> cluster_pb2.ListMovesResponse:
        with _catalog_needed():
            return await self._moves.list_moves()

    async def SetShard(  # noqa: N802
        self, request: cluster_pb2.SetShardRequest, deadline: Deadline
    ) -> cluster_pb2.SetShardResponse:
        with _catalog_needed():
            return await self._moves.set_shard(request)

    async def PinUser(  # noqa: N802
        self, request: cluster_pb2.PinUserRequest, deadline: Deadline
    ) -> cluster_pb2.PinUserResponse:
        with _catalog_needed():
            return await self._moves.pin(request)

    async def SetDegradation(  # noqa: N802  # As the rpc is called.
        self, request: cluster_pb2.SetDegradationRequest, deadline: Deadline
    ) -> cluster_pb2.SetDegradationResponse:
        server, secrets = self._plan.catalog_server(), self._plan.secrets
        with _catalog_needed():
            async with as_owner(server, secrets, _CATALOG_TIMEOUT_S) as connection:
                answer = await set_degradation(connection, request)
        self._log.warning("the degradation level of %s was set to %s", *in_words(request))
        return answer


class _Failovers:
    """Failover, which tells each step."""

    def __init__(self, shards: Mapping[str, ShardServers]) -> None:
        self._shards = shards
        self._at_work: set[asyncio.Task[None]] = set()

    async def stream(self, request: cluster_pb2.FailoverRequest) -> AsyncGenerator[cluster_pb2.FailoverProgress, None]:
        """Each step as it is done."""
        async for progress in self._steps(request):
            yield _message(progress)

    async def close(self) -> None:
        """Cancels what is still at work."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def _steps(self, request: cluster_pb2.FailoverRequest) -> AsyncIterator[Progress]:
        """Each step as it is done. The failover goes on when the caller leaves: half of one is worse than a whole."""
        shard = self._shards.get(request.shard_id)
        if shard is None:
            known = ", ".join(self._shards)
            raise errors.NotFound(f"there is no shard {request.shard_id!r}, only {known}", reason="SHARD_NOT_FOUND")
        steps: asyncio.Queue[Progress | None] = asyncio.Queue()
        failover = asyncio.create_task(PlannedFailover(shard, steps.put_nowait).run(request.to_server or None))
        self._at_work.add(failover)
        failover.add_done_callback(self._at_work.discard)
        failover.add_done_callback(lambda _task: steps.put_nowait(None))
        while (progress := await steps.get()) is not None:
            yield progress
        await failover


class _Restarts:
    """Restart, which tells each process."""

    def __init__(self, rolling: RollingRestart) -> None:
        self._rolling = rolling
        self._lasting = admin_streams.Lasting()

    async def stream(self, request: cluster_pb2.RestartRequest) -> AsyncGenerator[cluster_pb2.RestartProgress, None]:
        """Each process as it is well again."""
        async for one in self._lasting.follow(self._rolling.run(list(request.names))):
            message = f"{one.name} ({one.role}) has been restarted"
            yield cluster_pb2.RestartProgress(name=one.name, message=message, seconds=one.seconds)

    async def close(self) -> None:
        """Cancels what is still at work."""
        await self._lasting.close()


@contextmanager
def _catalog_needed() -> Iterator[None]:
    try:
        yield
    except LocalClusterError as error:
        raise errors.Unavailable(str(error), reason="CATALOG_UNAVAILABLE") from error


def _message(progress: Progress) -> cluster_pb2.FailoverProgress:
    return cluster_pb2.FailoverProgress(
        step=_STEPS[progress.step],
        message=progress.message,
        old_primary=progress.old,
        new_primary=progress.new,
    )
