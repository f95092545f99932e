"""How a service's methods meet the wire: parse, handle, serialise, and map errors, in one place for all of them.

Requests arrive as bytes and are parsed here rather than by gRPC, so that garbage and invalid UTF-8 are a clean
INVALID_ARGUMENT instead of INTERNAL, and a bug is the only thing that is ever INTERNAL.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeAlias

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from common import errors, logs, status
from common.deadline import Deadline
from common.methods import Methods

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


def methods_of(
    service: ServiceDescriptor,
    servicer: object,
    *,
    default_deadline_s: float,
    authorise: "Callable[[Context], None] | None" = None,
    admission: Admits | None = None,
) -> Methods:
    """What `servicer` offers of `service`: each rpc is the method of it that has the same name.

    They take (request, deadline) and return the response. An rpc that the servicer lacks answers UNIMPLEMENTED.
    `authorise` raises what a caller hears who may not call at all, `admission` what one hears who is too much; both
    before anything is looked at.
    """
    return Methods(
        service.full_name,
        {
            method.name: grpc.unary_unary_rpc_method_handler(
                _behavior(
                    method,
                    getattr(servicer, method.name, None) or _unimplemented(method),
                    default_deadline_s,
                    authorise or _everybody,
                    admission or _EVERYTHING,
                )
            )
            for method in service.methods
        },
    )


def add_trailer(key: str, value: str | bytes) -> None:
    """Sends something besides the answer to the call being handled, for those who look: the contract has no field."""
    context = _current.get()
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), (key, value)))


def _everybody(_: "Context") -> None:
    """May call."""


def _behavior(
    method: MethodDescriptor,
    handler: Handler,
    default_deadline_s: float,
    authorise: "Callable[[Context], None]",
    admission: Admits,
) -> _Behavior:
    request_class: type[Message] = GetMessageClass(method.input_type)

    async def behavior(raw: bytes, context: "Context") -> bytes:
        _current.set(context)
        deadline = Deadline.of(context, default_deadline_s)
        error: errors.MemshardError
        try:
            authorise(context)
            await admission.room(method.name)
            with admission.of(method.name):
                async with deadline.bound():
                    response = await handler(_parse(request_class, raw), deadline)
            return response.SerializeToString()
        except errors.MemshardError as raised:
            error = raised
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # Something that the handler waited for was cancelled, not the call: the caller still waits for a status.
            error = errors.Unavailable("the request was interrupted", reason=INTERRUPTED, retry_after_s=1.0)
        except TimeoutError:
            error = errors.DeadlineExceeded("the deadline passed before the answer was there")
        except Exception as bug:  # The last resort: whatever is not a domain error is a bug, and says so.
            _log.error("request failed by a bug", rpc=method.name, **logs.describe_bug(bug))
            error = errors.Internal("internal error; the server's log says where")
        try:
            await status.abort(context, error)
        finally:
            # Its traceback holds this frame, which would hold it: under overload, refusals would be garbage that only
            # the collector finds, and its pauses are what callers wait for.
            del error
        raise AssertionError("unreachable: abort raises")

    return behavior


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
