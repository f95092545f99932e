"""What the clients raise: one tree, by what the caller can do about it.

    MemshardError
    ├── InvalidArgument         a field of the request is wrong; also a ValueError
    ├── Unauthenticated         no valid credentials
    ├── PermissionDenied        the credentials do not allow this
    ├── NotFound                no such memory, or another user's
    ├── AlreadyExists           the id is taken by other content
    ├── FailedPrecondition      the state of the service or of the data does not allow this
    │   ├── Ambiguous           several users hold the id: name one
    │   └── ReadOnly            writes are refused for now
    ├── Aborted                 another writer was faster
    │   └── VersionMismatch     the memory is not at the expected version
    ├── ResourceExhausted       over a limit, or the service sheds load
    ├── Unavailable             a part of the service is not to be reached
    │   └── OutcomeUnknown      a write may or may not have happened: the same request again settles it
    ├── DeadlineExceeded        no answer in time: a write may have happened
    ├── Cancelled               the call was cancelled
    ├── Unimplemented           this server does not offer it
    └── InternalError           a bug in the service

Nothing here needs its text to be matched: the class, `reason` and `field_violations` say what happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN: Final = "memshard"
"""The google.rpc.ErrorInfo domain of the reasons; those of other domains are not ours to interpret."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field: its path in the wire contract (`memory.content`), or the argument's name."""

    field: str
    description: str


class MemshardError(Exception):
    """Any failed call.

    Attributes:
        message: what went wrong, for people.
        code: the gRPC status code.
        reason: the machine reason, such as "VERSION_MISMATCH"; "" when the failure is not the service's own, as when
            no server could be reached.
        field_violations: the fields at fault, when fields are.
        retry_after_s: how many seconds to wait before another try, when the service says so.
        retryable: whether the same request may succeed later. Writes of these clients carry their id, so that
            repeating a whole call *with the same id* never has a second effect.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        field_violations: Iterable[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        # Everything but the message has a default, so that an error can be pickled from one process to another.
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else type(self).code
        self.reason = reason
        self.field_violations = tuple(field_violations)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        fields = "; ".join(f"{v.field}: {v.description}" for v in self.field_violations)
        if not fields or fields == self.message:
            return self.message
        if self.message in {"", *(v.description for v in self.field_violations)}:
            return fields
        return f"{self.message} ({fields})"


class InvalidArgument(MemshardError, ValueError):
    """A field of the request is wrong; `field_violations` names it. Raised before sending where that is certain."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(MemshardError):
    """No valid credentials came with the call."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(MemshardError):
    """The credentials do not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(MemshardError):
    """There is no such memory, or it is another user's."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(MemshardError):
    """The id is taken by a memory with other content."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(MemshardError):
    """The state of the service or of the data does not allow this call."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Ambiguous(FailedPrecondition):
    """Several users hold a memory with this id: name the user."""


class ReadOnly(FailedPrecondition):
    """The service refuses writes for now."""


class Aborted(MemshardError):
    """Another writer was faster."""

    code = grpc.StatusCode.ABORTED


class VersionMismatch(Aborted):
    """The memory is not at the expected version: read it again."""


class ResourceExhausted(MemshardError):
    """Over a limit, or the service sheds load; `retry_after_s` says how long to wait."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class Unavailable(MemshardError):
    """The service, or the shard that is needed, is not to be reached at present."""

    code = grpc.StatusCode.UNAVAILABLE
    retryable = True


class OutcomeUnknown(Unavailable):
    """A write may or may not have been made. The same request, with the same id, settles it."""


class DeadlineExceeded(MemshardError):
    """No answer came in time. A write may have been made: the same request, with the same id, settles it."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    retryable = True


class Cancelled(MemshardError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(MemshardError):
    """This server does not offer the call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(MemshardError):
    """A bug in the service, or something that answers but is not memshard."""

    code = grpc.StatusCode.INTERNAL


# The one table from status to class: first by code and reason, then by code alone.
_CLASSES: Final[dict[tuple[grpc.StatusCode, str], type[MemshardError]]] = {
    (grpc.StatusCode.INVALID_ARGUMENT, ""): InvalidArgument,
    (grpc.StatusCode.OUT_OF_RANGE, ""): InvalidArgument,
    (grpc.StatusCode.UNAUTHENTICATED, ""): Unauthenticated,
    (grpc.StatusCode.PERMISSION_DENIED, ""): PermissionDenied,
    (grpc.StatusCode.NOT_FOUND, ""): NotFound,
    (grpc.StatusCode.ALREADY_EXISTS, ""): AlreadyExists,
    (grpc.StatusCode.FAILED_PRECONDITION, ""): FailedPrecondition,
    (grpc.StatusCode.FAILED_PRECONDITION, "AMBIGUOUS"): Ambiguous,
    (grpc.StatusCode.FAILED_PRECONDITION, "READ_ONLY"): ReadOnly,
    (grpc.StatusCode.ABORTED, ""): Aborted,
    (grpc.StatusCode.ABORTED, "VERSION_MISMATCH"): VersionMismatch,
    (grpc.StatusCode.RESOURCE_EXHAUSTED, ""): ResourceExhausted,
    (grpc.StatusCode.UNAVAILABLE, ""): Unavailable,
    (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"): OutcomeUnknown,
    (grpc.StatusCode.DEADLINE_EXCEEDED, ""): DeadlineExceeded,
    (grpc.StatusCode.CANCELLED, ""): Cancelled,
    (grpc.StatusCode.UNIMPLEMENTED, ""): Unimplemented,
}
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: grpc.RpcError) -> MemshardError:
    """The exception for a failed call of either client, with what its status details say.

    Details that do not parse, or contradict the status, are left aside: the status itself always survives.
    """
    code = error.code()
    status: status_pb2.Status | None = None
    with contextlib.suppress(DecodeError, ValueError):  # ValueError: the details contradict the call's own status.
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # grpc's failed calls are errors and calls.
    if status is None:
        status = status_pb2.Status(code=code.value[0], message=error.details() or "")
    return from_status(status)


def from_status(status: status_pb2.Status) -> MemshardError:
    """The exception for a google.rpc.Status, such as a shard's in a report. It is returned, not raised."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason = ""
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    for detail in status.details:
        try:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                reason = info.reason if info.domain == DOMAIN else reason
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest.FromString(detail.value)
                violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after_s = max(0.0, delay.seconds + delay.nanos / 1e9)
        except DecodeError:
            continue  # One malformed detail must not hide the status, nor the other details.
    kind = _CLASSES.get((code, reason)) or _CLASSES.get((code, ""), InternalError)
    return kind(
        status.message or code.name,
        code=code,
        reason=reason,
        field_violations=violations,
        retry_after_s=retry_after_s,
    )


def invalid(field: str, description: str) -> InvalidArgument:
    """The error for an argument that is wrong whatever the server says."""
    return InvalidArgument(description, field_violations=[FieldViolation(field, description)])
