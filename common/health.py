"""grpc.health.v1: what balancers and watchers are told about this process."""

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from common.methods import Methods

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

LIVENESS = "liveness"
"""Asked about this, a process that answers says SERVING, whether it can serve or not: for whoever ends what hangs."""

_Response = health_pb2.HealthCheckResponse


class Health:
    """One state for all services of the process, NOT_SERVING at first.

    grpcio's own servicer never ends a watch, so that a server that is watched would drain until its time runs out.
    """

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = frozenset(("", *service_names))
        self._serving = False
        self._stopping = False
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Whether calls can be answered. Without effect once the process stops."""
        if not self._stopping:
            self._change(serving)

    def stop(self) -> None:
        """NOT_SERVING for good; watchers hear it as the last thing before their streams end."""
        self._stopping = True
        self._change(False)

    def methods(self) -> Methods:
        """What the service offers. Requests are parsed here, so that garbage is INVALID_ARGUMENT."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        return Methods(SERVICE_NAME, methods)

    async def _check(self, raw: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        service = await _service(raw, context)
        if service not in self._names and service != LIVENESS:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        return self._health_of(service).SerializeToString()

    async def _watch(self, raw: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> AsyncIterator[bytes]:
        service = await _service(raw, context)
        told = None
        while True:
            # Taken before the health is read, so that no change in between is missed.
            changed = self._changed
            health = self._health_of(service)
            if health != told:
                yield health.SerializeToString()
                told = health
            elif self._stopping:
                return
            else:
                await changed.wait()

    def _health_of(self, service: str) -> health_pb2.HealthCheckResponse:
        if service == LIVENESS:
            return _Response(status=_Response.SERVING)
        if service not in self._names:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if self._serving else _Response.NOT_SERVING)

    def _change(self, serving: bool) -> None:
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _service(raw: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> str:
    """The service that a request asks about."""
    try:
        return health_pb2.HealthCheckRequest.FromString(raw).service
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no valid HealthCheckRequest")
        raise
