"""ClusterService: how `memshard failover` and its kin reach the supervisor. Loopback, and a token in a private file."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError

from common import errors, status
from common.bearer import Bearer
from common.deadline import Deadline
from common.level import Level
from common.rpc import methods_of
from local.appointment import RefusedError
from local.cluster import Plan
from local.degradation import set_level
from local.errors import LocalClusterError
from local.planned_failover import PlannedFailover, Progress, Step
from local.ports import HOST
from local.shard_servers import ShardServers
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

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


@asynccontextmanager
async def serving(
    port: int, token: str, plan: Plan, shards: Mapping[str, ShardServers], log: logging.Logger
) -> AsyncIterator[None]:
    """Serves until the end of the block. Raises LocalClusterError when the port cannot be had."""
    bearer = Bearer(token)
    failovers = _Failovers(bearer, shards, log)
    answers = methods_of(
        _SERVICE, _Answers(plan, log), default_deadline_s=_DEFAULT_DEADLINE_S, authorise=bearer.require
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    answers.with_stream("Failover", failovers.answer).add_to(server)
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

    def __init__(self, bearer: Bearer, shards: Mapping[str, ShardServers], log: logging.Logger) -> None:
        self._bearer = bearer
        self._shards = shards
        self._log = log
        self._at_work: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancels what is still at work."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def answer(self, raw: bytes, context: "Context") -> AsyncIterator[bytes]:
        """Answers the rpc. Requests are parsed here, so that garbage is INVALID_ARGUMENT."""
        try:
            self._bearer.require(context)
            async for progress in self._steps(cluster_pb2.FailoverRequest.FromString(raw)):
                yield _message(progress).SerializeToString()
        except DecodeError:
            await status.abort(context, errors.InvalidArgument("not a FailoverRequest", reason="MALFORMED_REQUEST"))
        except errors.MemshardError as error:
            await status.abort(context, error)
        except RefusedError as error:
            await status.abort(context, errors.FailedPrecondition(str(error), reason="NOT_POSSIBLE"))
        except LocalClusterError as error:
            await status.abort(context, errors.Unavailable(str(error), reason="FAILOVER_UNFINISHED"))
        except Exception:
            self._log.exception("Failover failed by a bug")
            await status.abort(context, errors.Internal("internal error; the supervisor's log says where"))

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


def _message(progress: Progress) -> cluster_pb2.FailoverProgress:
    return cluster_pb2.FailoverProgress(
        step=_STEPS[progress.step],
        message=progress.message,
        old_primary=progress.old,
        new_primary=progress.new,
    )
