"""ClusterService: how `memshard failover` and its kin reach the supervisor. Loopback, and a token in a private file."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError

from common import errors, status
from local.appointment import RefusedError
from local.errors import LocalClusterError
from local.planned_failover import PlannedFailover, Progress, Step
from local.ports import HOST
from local.shard_servers import ShardServers
from memshard.admin.v1 import cluster_pb2

_HEADER = "authorization"
_STOP_GRACE_S = 0.2

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
    port: int, token: str, shards: Mapping[str, ShardServers], log: logging.Logger
) -> AsyncIterator[None]:
    """Serves until the end of the block. Raises LocalClusterError when the port cannot be had."""
    servicer = _Servicer(token, shards, log)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([servicer.handler()])
    try:
        server.add_insecure_port(f"{HOST}:{port}")
    except RuntimeError as error:
        raise LocalClusterError(f"port {port} is in use by something else; start again") from error
    await server.start()
    try:
        yield
    finally:
        await server.stop(_STOP_GRACE_S)
        await servicer.close()


class _Servicer:
    def __init__(self, token: str, shards: Mapping[str, ShardServers], log: logging.Logger) -> None:
        self._expected = f"Bearer {token}".encode()
        self._shards = shards
        self._log = log
        self._at_work: set[asyncio.Task[None]] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """gRPC's handler of the service. Requests are parsed here, so that garbage is INVALID_ARGUMENT."""
        return grpc.method_handlers_generic_handler(
            _SERVICE.full_name, {"Failover": grpc.unary_stream_rpc_method_handler(self._failover)}
        )

    async def close(self) -> None:
        """Cancels what is still at work."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def _failover(self, raw: bytes, context: "Context") -> AsyncIterator[bytes]:
        try:
            self._authorise(context)
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

    def _authorise(self, context: "Context") -> None:
        given = dict(context.invocation_metadata() or ()).get(_HEADER, "")
        if not hmac.compare_digest(str(given).encode(), self._expected):
            raise errors.Unauthenticated("this needs the token that is kept in the cluster's data directory")


def _message(progress: Progress) -> cluster_pb2.FailoverProgress:
    return cluster_pb2.FailoverProgress(
        step=_STEPS[progress.step],
        message=progress.message,
        old_primary=progress.old,
        new_primary=progress.new,
    )
