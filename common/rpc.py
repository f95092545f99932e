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

from common import errors, logs, status, tracing
from common.deadline import Deadline
from common.methods import Methods
from common.telemetry.calls import Call, Operation

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

_log = logs.get_logger("rpc")

# The reason of a call that ended before its work did, so that a write may still happen.
INTERRUPTED = "INTERRUPTED"

_current: "ContextVar[Context]" = ContextVar("the call being handled")
_received_bytes: ContextVar[int] = ContextVar("the size of its request")


class Admits(Protocol):
    """What refuses calls that are too many."""

    async def room(self, rpc: str) -> None:
        """Returns when there is room for a call of the rpc with this name. Raises MemshardError."""
        ...

    def of(self, rpc: str) -> AbstractContextManager[None]:
        """`with` it: the call, at once after `room`. Raises MemshardError, before anything is done."""
        ...


class Watches(Protocol):
    """What looks at requests and answers as they pass, for metrics and traces. It must not raise."""

    def asked(self, rpc: str, request: Message) -> None:
        """A request was parsed. Nothing is known of its worth yet."""
        ...

    def answered(self, rpc: str, request: Message, response: Message | bytes, size_bytes: int) -> None:
        """It was answered, with so many bytes."""
        ...


# A response that is there as bytes already is sent as it is.
Handler = Callable[[Message, Deadline], Awaitable[Message | bytes]]
_Behavior = Callable[[bytes, "Context"], Awaitable[bytes]]


def methods_of(
    service: ServiceDescriptor,
    servicer: object,
    *,
    default_deadline_s: float,
    authorise: "Callable[[Context], None] | None" = None,
    admission: Admits | None = None,
    watch: Watches | None = None,
    begins_traces: bool = False,
) -> Methods:
    """What `servicer` offers of `service`: each rpc is the method of it that has the same name.

    They take (request, deadline) and return the response. An rpc that the servicer lacks answers UNIMPLEMENTED.
    `authorise` raises what a caller hears who may not call at all, `admission` what one hears who is too much; both
    before anything is looked at. `watch` sees what passes. A call without a trace around it has one with
    `begins_traces`.
    """
    return Methods(
        service.full_name,
        {
            method.name: grpc.unary_unary_rpc_method_handler(
                _behavior(
                    method,
                    _Answering(
                        method,
                        getattr(servicer, method.name, None) or _unimplemented(method),
                        authorise or _everybody,
                        admission or _EVERYTHING,
                        watch or _NOBODY,
                    ),
                    default_deadline_s,
                    begins_traces=begins_traces,
                )
            )
            for method in service.methods
        },
    )


def add_trailer(key: str, value: str | bytes) -> None:
    """Sends something besides the answer to the call being handled, for those who look: the contract has no field."""
    context = _current.get()
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), (key, value)))


def received_bytes() -> int:
    """Size of the request being handled, as it came: to ask the message costs as much as to serialise it."""
    return _received_bytes.get()


def _everybody(_: "Context") -> None:
    """May call."""


def _behavior(
    method: MethodDescriptor, answering: "_Answering", default_deadline_s: float, *, begins_traces: bool
) -> _Behavior:
    full_name = f"{method.containing_service.full_name}/{method.name}"
    operation = Operation(method.name, full_name)

    async def behavior(raw: bytes, context: "Context") -> bytes:
        _current.set(context)
        _received_bytes.set(len(raw))
        span = tracing.received(full_name, context.invocation_metadata() or (), begins=begins_traces)
        with Call(operation, span) as call:
            outcome = await answering.outcome(raw, context, Deadline.of(context, default_deadline_s))
            if isinstance(outcome, bytes):
                call.answered = True
                return outcome
            call.error = outcome
        await status.abort(context, outcome)
        raise AssertionError("unreachable: abort raises")

    return behavior


class _Answering:
    """One rpc: from a request's bytes to the answer's, or to the error that the caller is to hear."""

    def __init__(
        self,
        method: MethodDescriptor,
        handler: Handler,
        authorise: "Callable[[Context], None]",
        admission: Admits,
        watch: Watches,
    ) -> None:
        self._rpc = method.name
        self._request_class: type[Message] = GetMessageClass(method.input_type)
        self._handler = handler
        self._authorise = authorise
        self._admission = admission
        self._watch = watch

    async def outcome(self, raw: bytes, context: "Context", deadline: Deadline) -> bytes | errors.MemshardError:
        """Raises CancelledError when the caller has left, and nothing else."""
        try:
            self._authorise(context)
            await self._admission.room(self._rpc)
            with self._admission.of(self._rpc):
                async with deadline.bound():
                    request = _parse(self._request_class, raw)
                    self._watch.asked(self._rpc, request)
                    response = await self._handler(request, deadline)
            answer = response if isinstance(response, bytes) else response.SerializeToString()
            self._watch.answered(self._rpc, request, response, len(answer))
        except errors.MemshardError as raised:
            return raised
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # Something that the handler waited for was cancelled, not the call: the caller still waits for a status.
            return errors.Unavailable("the request was interrupted", reason=INTERRUPTED, retry_after_s=1.0)
        except TimeoutError:
            return errors.DeadlineExceeded("the deadline passed before the answer was there")
        except Exception as bug:  # The last resort: whatever is not a domain error is a bug, and says so.
            _log.error("request failed by a bug", rpc=self._rpc, **logs.describe_bug(bug))
            return errors.Internal("internal error; the server's log says where")
        return answer


class _Everything:
    async def room(self, rpc: str) -> None:
        """There always is."""

    def of(self, rpc: str) -> AbstractContextManager[None]:
        return nullcontext()


_EVERYTHING = _Everything()


class _Nobody:
    def asked(self, rpc: str, request: Message) -> None:
        """Is not looked at."""

    def answered(self, rpc: str, request: Message, response: Message | bytes, size_bytes: int) -> None:
        """Is not looked at."""


_NOBODY = _Nobody()


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
