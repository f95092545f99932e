"""The tree of domain errors. Each knows its gRPC code, its machine reason and whether trying again can help.

MemshardError
├── InvalidArgument       the request is wrong: names the field, one reason for each kind of fault
├── NotFound              no such memory, or another user's
├── AlreadyExists         the id is taken by other content
├── FailedPrecondition
│   ├── Ambiguous         one id, several users, no user given
│   ├── ReadOnly          writes are refused for the time being
│   └── WrongShard        stale topology; stays inside the cluster
├── Aborted
│   └── VersionMismatch   the memory is at another version than expected
├── ResourceExhausted     over a limit
├── Unavailable           something that should answer does not; try again
│   └── OutcomeUnknown    a commit whose fate is unknown; the same request settles it
├── DeadlineExceeded      the caller's time is up
├── Unauthenticated       no token, or a wrong one, for a service that asks for one
├── Unimplemented         in the contract, not offered yet
└── Internal              a bug, always

`common.status` turns them into gRPC statuses and back; nobody else does, and nobody matches on message texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import grpc

from common import departure
from common.departure import Departure


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request, by its path in the proto (`memory.content`), and what is wrong with it."""

    field: str
    description: str


class MemshardError(Exception):
    """Base of all domain errors; raise a subclass."""

    code: ClassVar[grpc.StatusCode]
    default_reason: ClassVar[str]
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidArgument(MemshardError):
    """The request is wrong and will stay so."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"

    @classmethod
    def field(cls, field: str, reason: str, description: str) -> "InvalidArgument":
        """One bad field: `field` is its path in the proto, `reason` the machine's word for the fault."""
        return cls(f"{field}: {description}", reason=reason, violations=(FieldViolation(field, description),))


class NotFound(MemshardError):
    code = grpc.StatusCode.NOT_FOUND
    default_reason = "MEMORY_NOT_FOUND"


class AlreadyExists(MemshardError):
    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ID_TAKEN"


class FailedPrecondition(MemshardError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class Ambiguous(FailedPrecondition):
    default_reason = "AMBIGUOUS"


class ReadOnly(FailedPrecondition):
    default_reason = "READ_ONLY"


class WrongShard(FailedPrecondition):
    """The slot is not served here; `epoch` is the newest topology this shard knows of, and `departures` say where slots
    went. `fenced`: it is being handed over at this moment, and who owns it is about to be known.
    """

    default_reason = "WRONG_SHARD"

    def __init__(
        self, message: str, *, epoch: int, departures: tuple[Departure, ...] = (), fenced: bool = False
    ) -> None:
        metadata = {"epoch": str(epoch)}
        if departures:
            metadata["departures"] = departure.to_text(departures)
        if fenced:
            metadata["fenced"] = "true"
        super().__init__(message, metadata=metadata)
        self.epoch = epoch
        self.departures = departures
        self.fenced = fenced


class Aborted(MemshardError):
    code = grpc.StatusCode.ABORTED
    default_reason = "ABORTED"


class VersionMismatch(Aborted):
    default_reason = "VERSION_MISMATCH"


class ResourceExhausted(MemshardError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "LIMIT_EXCEEDED"
    retryable = True


class Unavailable(MemshardError):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"
    retryable = True


class OutcomeUnknown(Unavailable):
    default_reason = "OUTCOME_UNKNOWN"


class DeadlineExceeded(MemshardError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"
    retryable = True


class Unauthenticated(MemshardError):
    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "BAD_TOKEN"


class Unimplemented(MemshardError):
    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "NOT_IMPLEMENTED"


class Internal(MemshardError):
    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"
