"""The one mapping between domain errors and gRPC statuses, in both directions."""

from typing import cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from common import departure, errors
from common.errors import FieldViolation, MemshardError

DOMAIN = "memshard"
_PUSHBACK = "grpc-retry-pushback-ms"
# Seconds after which to come back, unless the error knows better: about what a process takes to be restarted.
_UNAVAILABLE_FOR_S = 1.0
# Longer waits are the caller's to decide.
_LONGEST_PUSHBACK_S = 5.0
# Those of the largest int64.
_MAX_EPOCH_DIGITS = 19

_CLASSES: tuple[type[MemshardError], ...] = (
    errors.InvalidArgument,
    errors.NotFound,
    errors.AlreadyExists,
    errors.FailedPrecondition,
    errors.Ambiguous,
    errors.ReadOnly,
    errors.Aborted,
    errors.VersionMismatch,
    errors.ResourceExhausted,
    errors.Unavailable,
    errors.OutcomeUnknown,
    errors.DeadlineExceeded,
    errors.Unauthenticated,
    errors.Unimplemented,
    errors.Internal,
)
_CLASS_BY_REASON = {cls.default_reason: cls for cls in _CLASSES}
# grpc.StatusCode's value is (number, text); google.rpc.Status carries the number.
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
# The first class of each code is the general one.
_CLASS_BY_CODE = {cls.code: cls for cls in reversed(_CLASSES)}


def to_status(error: MemshardError) -> status_pb2.Status:
    """`error` as the google.rpc.Status that travels in trailers, batch results and reports."""
    details: list[any_pb2.Any] = []

    def attach(
        message: "error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo",
    ) -> None:
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)

    attach(error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.reason, metadata=error.metadata))
    if error.violations:
        attach(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in error.violations
                ]
            )
        )
    if (retry_after_s := _retry_after_s(error)) is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_after_s * 1000))
        attach(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=details)


async def abort(context: "grpc.aio.ServicerContext[bytes, bytes]", error: MemshardError) -> None:
    """Ends the call with `error`. Always raises, as grpc's own abort does."""
    status = rpc_status.to_status(to_status(error))
    trailers = tuple(status.trailing_metadata)
    if error.code is grpc.StatusCode.UNAVAILABLE and (retry_after_s := _retry_after_s(error)) is not None:
        trailers += ((_PUSHBACK, str(pushback_ms(retry_after_s, context.time_remaining()))),)
    await context.abort(status.code, status.details, trailers)


def pushback_ms(retry_after_s: float, remaining_s: float | None) -> int:
    """How long a client that retries by itself is to wait, in milliseconds; -1: it is not to retry.

    gRPC's clients know this trailer (gRFC A6), and not RetryInfo. One that is told to wait until after its deadline
    would wait for nothing, and lose the error. `remaining_s` is None when there is no deadline.
    """
    if retry_after_s > _LONGEST_PUSHBACK_S or (remaining_s is not None and retry_after_s >= remaining_s):
        return -1
    return round(retry_after_s * 1000)


def _retry_after_s(error: MemshardError) -> float | None:
    """Seconds that the caller is told to wait. Whoever is told UNAVAILABLE is told when to come back as well."""
    if error.retry_after_s is None and error.code is grpc.StatusCode.UNAVAILABLE:
        return _UNAVAILABLE_FOR_S
    return error.retry_after_s


def from_rpc_error(error: grpc.aio.AioRpcError) -> MemshardError | None:
    """The domain error that another memshard service answered a call with; None when gRPC itself failed the call."""
    status = _details(error)
    return from_status(status) if status else None


def from_status(status: status_pb2.Status) -> MemshardError | None:
    """The domain error that a google.rpc.Status was made of; None when it is not one of ours."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad_request, retry):
            _read(detail, message)
    if info.domain != DOMAIN:
        return None
    text = status.message or info.reason
    if info.reason == errors.WrongShard.default_reason:
        epoch = info.metadata.get("epoch", "")
        known = epoch.isdecimal() and len(epoch) <= _MAX_EPOCH_DIGITS
        return errors.WrongShard(
            text,
            epoch=int(epoch) if known else 0,
            departures=departure.from_text(info.metadata.get("departures", "[]")),
            fenced=info.metadata.get("fenced") == "true",
        )
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    cls = _CLASS_BY_REASON.get(info.reason) or _CLASS_BY_CODE.get(code, errors.Unavailable)
    return cls(
        text,
        reason=info.reason,
        violations=tuple(FieldViolation(v.field, v.description) for v in bad_request.field_violations),
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None,
        metadata=dict(info.metadata),
    )


def _read(detail: any_pb2.Any, message: Message) -> None:
    """Fills `message` if `detail` is one of its kind. A garbled detail is left out; it must not hide the status."""
    if detail.TypeName() == message.DESCRIPTOR.full_name:
        try:
            detail.Unpack(message)
        except DecodeError:
            message.Clear()


def _details(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    try:
        return rpc_status.from_call(cast("grpc.Call", error))
    except (DecodeError, ValueError):
        # Trailers that contradict the status, or are not a status: the code alone has to do.
        return None
