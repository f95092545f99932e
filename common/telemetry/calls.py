"""What is counted of each call that a service answers, or makes. Labels are looked up once, not with each call."""

import time
from types import TracebackType
from typing import Self

from common.errors import MemshardError
from common.telemetry.instruments import Counter, Histogram
from common.telemetry.registry import (
    IN_FLIGHT,
    OPERATION_DURATION,
    OPERATION_ERRORS,
    OPERATIONS,
    RPC_CLIENT_DURATION,
    RPC_SERVER_DURATION,
)
from common.tracing import Span

OK = "OK"
# Of a caller that left: there is no answer, and no error either.
CANCELLED = "CANCELLED"

# Reasons are the project's own, and fewer than this. What comes from elsewhere on top of them is "other".
_MOST_REASONS = 100


class Operation:
    """What is counted of one rpc: `operation` is its name, `method` that with its service's."""

    def __init__(self, operation: str, method: str) -> None:
        self._operation = operation
        self._method = method
        self.in_flight = IN_FLIGHT.labels(operation)
        self._answered = OPERATION_DURATION.labels(operation)
        self._ended: dict[str, Histogram] = {}
        self._reasons: dict[str, Counter] = {}

    def ended(self, status: str) -> Histogram:
        """What counts calls of this status, and how long they took: under all the names that this has, at once."""
        duration = self._ended.get(status)
        if duration is None:
            duration = self._ended[status] = RPC_SERVER_DURATION.labels("grpc", self._method, status)
            if status == OK:
                duration.share(self._answered)
            OPERATIONS.labels(self._operation, status).count(duration)
        return duration

    def failed(self, reason: str) -> Counter:
        """What counts calls that failed for this reason."""
        if reason not in self._reasons:
            reason = reason if len(self._reasons) < _MOST_REASONS else "other"
            self._reasons.setdefault(reason, OPERATION_ERRORS.labels(self._operation, reason))
        return self._reasons[reason]


class Call:
    """`with` it: one call, within its span. `error` is to be set when it is to end with one."""

    __slots__ = ("_began", "_operation", "_span", "answered", "error")

    def __init__(self, operation: Operation, span: Span) -> None:
        self._operation = operation
        self._span = span
        self.error: MemshardError | None = None
        self.answered = False

    def __enter__(self) -> Self:
        self._operation.in_flight.inc()
        self._began = time.perf_counter()
        self._span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        took_s = time.perf_counter() - self._began
        self._operation.in_flight.dec()
        status = OK if self.answered else CANCELLED
        if self.error is not None:
            status = self.error.code.name
            self._operation.failed(self.error.reason).inc()
        self._span.set("rpc.response.status_code", status)
        self._span.__exit__(kind, self.error or error, trace)
        # A trace that nobody keeps is no example of anything.
        exemplar = {"trace_id": self._span.trace_id} if self._span.is_kept else None
        self._operation.ended(status).observe(took_s, exemplar)


class CallsMade:
    """What is counted of the calls that this service makes to others of the cluster, of one gRPC service."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._ended: dict[tuple[str, str], Histogram] = {}

    def ended(self, rpc: str, status: str, took_s: float) -> None:
        """One call has, with a gRPC status by its name; CANCELLED when nobody waits for its answer any more."""
        duration = self._ended.get((rpc, status))
        if duration is None:
            duration = RPC_CLIENT_DURATION.labels("grpc", f"{self._service}/{rpc}", status)
            self._ended[rpc, status] = duration
        duration.observe(took_s)
