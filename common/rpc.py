"""How a service's methods meet the wire: parse, handle, serialise, and map errors, in one place for all of them.

Requests arrive as bytes and are parsed here rather than by gRPC, so that garbage and invalid UTF-8 are a clean
INVALID_ARGUMENT instead of INTERNAL, and a bug is the only thing that is ever INTERNAL.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from common import errors, logs, status
from common.deadline import Deadline
from common.multiplex import Answering, Multiplexer
from memshard.internal.v1 import shard_pb2

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

_log = logs.get_logger("rpc")

# The reason of a call that ended before its work did, so that a write may still happen.
INTERRUPTED = "INTERRUPTED"

_current: "ContextVar[Context]" = ContextVar("the call being handled")


class Admits(Protocol):
    """What refuses calls that are too many."""

    async def room(self, rpc: str) -> None:
        """Returns when there is room for a call of the rpc with this name. Raises MemshardError."""
        ...

    def of(self, rpc: str) -> AbstractContextManager[None]:
        """`with` it: the call, at once after `room`. Raises MemshardError, before anything is done."""
        ...


Handler = Callable[[Message, Deadline], Awaitable[Message]]
_Behavior = Callable[[bytes, "Context"], Awaitable[bytes]]


class ServiceHandler(grpc.ServiceRpcHandler):
    """gRPC's handler of one service."""

    def __init__(
        self, name: str, methods: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]", streams: Multiplexer
    ) -> None:
        self._name = name
        self._methods = {f"/{name}/{method}": handler for method, handler in methods.items()}
        self._streams = streams

    def service_name(self) -> str:
        return self._name

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        return self._methods.get(details.method)

    def leave(self) -> None:
        """Has streams that carry many calls end, once those are answered."""
        self._streams.leave()


def generic_handler(
    service: ServiceDescriptor,
    servicer: object,
    *,
    default_deadline_s: float,
    authorise: "Callable[[Context], None] | None" = None,
    admission: Admits | None = None,
) -> ServiceHandler:
    """gRPC's handler of `service`: each rpc is the method of `servicer` that has its name.

    Methods take (request, deadline) and return the response. An rpc that the servicer lacks answers UNIMPLEMENTED.
    `authorise` raises what a caller hears who may not call at all, `admission` what one hears who is too much; both
    before anything is looked at. An rpc of two streams is one that carries calls of the others.
    """
    answers = {
        method.name: _answering(
            method, getattr(servicer, method.name, None) or _unimplemented(method), admission or _EVERYTHING
        )
        for method in service.methods
        if not method.client_streaming
    }
    streams = Multiplexer(answers, default_deadline_s)
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(_behavior(answer, default_deadline_s, authorise or _everybody))
        for name, answer in answers.items()
    }
    for method in service.methods:
        if method.client_streaming:
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(
                streams.serve,
                request_deserializer=shard_pb2.MultiplexRequest.FromString,
                response_serializer=shard_pb2.MultiplexResponse.SerializeToString,
            )
    return ServiceHandler(service.full_name, handlers, streams)


def add_trailer(key: str, value: str | bytes) -> None:
    """Sends something besides the answer to the call being handled, for those who look: the contract has no field."""
    context = _current.get()
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), (key, value)))


def _everybody(_: "Context") -> None:
    """May call."""


def _behavior(answer: Answering, default_deadline_s: float, authorise: "Callable[[Context], None]") -> _Behavior:
    """One call by itself."""

    async def behavior(raw: bytes, context: "Context") -> bytes:
        _current.set(context)
        try:
            authorise(context)
            return await answer(raw, Deadline.of(context, default_deadline_s))
        except errors.MemshardError as error:
            await status.abort(context, error)
            raise AssertionError("unreachable: abort raises") from error

    return behavior


def _answering(method: MethodDescriptor, handler: Handler, admission: Admits) -> Answering:
    """Bytes to bytes; whatever goes wrong is a MemshardError."""
    request_class: type[Message] = GetMessageClass(method.input_type)

    async def answer(raw: bytes, deadline: Deadline) -> bytes:
        try:
            await admission.room(method.name)
            with admission.of(method.name):
                async with deadline.bound():
                    response = await handler(_parse(request_class, raw), deadline)
            return response.SerializeToString()
        except errors.MemshardError:
            raise
        except asyncio.CancelledError as cancelled:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # Something that the handler waited for was cancelled, not the call: the caller still waits for a status.
            raise errors.Unavailable(
                "the request was interrupted", reason=INTERRUPTED, retry_after_s=1.0
            ) from cancelled
        except TimeoutError as error:
            raise errors.DeadlineExceeded("the deadline passed before the answer was there") from error
        except Exception as bug:  # The last resort: whatever is not a domain error is a bug, and says so.
            _log.error("request failed by a bug", rpc=method.name, **logs.describe_bug(bug))
            raise errors.Internal("internal error; the server's log says where") from bug

    return answer


class _Everything:
    async def room(self, rpc: str) -> None:
        """There always is."""

    def of(self, rpc: str) -> AbstractContextManager[None]:
        return nullcontext()


_EVERYTHING = _Everything()


def _parse(request_class: type[Message], raw: bytes) -> Message:
    try:
        return request_class.FromString(raw)
    except DecodeError as error:
        raise errors.InvalidArgument(
            f"the request is no valid {request_class.DESCRIPTOR.full_name}: truncated, garbled, or not UTF-8",
            reason="MALFORMED_REQUEST",
        ) from error


def _unimplemented(method: MethodDescriptor) -> Handler:
    async def handler(request: Message, deadline: Deadline) -> Message:
        raise errors.Unimplemented(f"{method.full_name} is not offered yet")

    return handler
