"""From status to exception: by reason, then by code; and never a lost status."""

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

import memshard
from memshard import FieldViolation, errors
from tests.unit.sdk.server import info, status

_Code = grpc.StatusCode


class _Call(grpc.RpcError):
    """A failed call with these trailers."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, Any], ...]) -> None:
        self._answers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._answers[0]

    def details(self) -> str:
        return self._answers[1]

    def trailing_metadata(self) -> Any:
        return self._answers[2]


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (_Code.INVALID_ARGUMENT, "BAD_ID", errors.InvalidArgument),
        (_Code.OUT_OF_RANGE, "", errors.InvalidArgument),
        (_Code.NOT_FOUND, "MEMORY_NOT_FOUND", errors.NotFound),
        (_Code.ALREADY_EXISTS, "ID_TAKEN", errors.AlreadyExists),
        (_Code.FAILED_PRECONDITION, "AMBIGUOUS", errors.Ambiguous),
        (_Code.FAILED_PRECONDITION, "READ_ONLY", errors.ReadOnly),
        (_Code.FAILED_PRECONDITION, "NEW_IN_A_LATER_VERSION", errors.FailedPrecondition),
        (_Code.ABORTED, "VERSION_MISMATCH", errors.VersionMismatch),
        (_Code.ABORTED, "", errors.Aborted),
        (_Code.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED", errors.ResourceExhausted),
        (_Code.UNAVAILABLE, "", errors.Unavailable),
        (_Code.UNAVAILABLE, "OUTCOME_UNKNOWN", errors.OutcomeUnknown),
        (_Code.DEADLINE_EXCEEDED, "", errors.DeadlineExceeded),
        (_Code.UNIMPLEMENTED, "", errors.Unimplemented),
        (_Code.CANCELLED, "", errors.Cancelled),
        (_Code.UNAUTHENTICATED, "", errors.Unauthenticated),
        (_Code.PERMISSION_DENIED, "", errors.PermissionDenied),
        (_Code.INTERNAL, "", errors.InternalError),
        (_Code.UNKNOWN, "", errors.InternalError),
        (_Code.DATA_LOSS, "", errors.InternalError),
    ],
)
def test_status_becomes_the_class_of_its_reason_or_code(
    code: grpc.StatusCode, reason: str, kind: type[errors.MemshardError]
) -> None:
    error = errors.from_status(status(code, "why", info(reason)))
    assert type(error) is kind
    assert (error.code, error.reason, error.message) == (code, reason, "why")


def test_reason_of_another_domain_is_not_interpreted() -> None:
    error = errors.from_status(status(_Code.FAILED_PRECONDITION, "why", info("READ_ONLY", "elsewhere.example")))
    assert type(error) is errors.FailedPrecondition
    assert error.reason == ""


def test_details_give_fields_and_the_time_to_wait() -> None:
    bad = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="memory.content", description="is empty")]
    )
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    error = errors.from_status(status(_Code.INVALID_ARGUMENT, "bad memory", info("EMPTY"), bad, wait))
    assert error.field_violations == (FieldViolation("memory.content", "is empty"),)
    assert error.retry_after_s == 1.5
    assert str(error) == "bad memory (memory.content: is empty)"


def test_text_says_the_field_once() -> None:
    for message in ("memory.content: is empty", "is empty"):
        bad = errors.InvalidArgument(message, field_violations=[FieldViolation("memory.content", "is empty")])
        assert str(bad) == "memory.content: is empty"


def test_details_that_are_noise_do_not_hide_the_status() -> None:
    for trailer in (b"\xff\xff\xff", status(_Code.NOT_FOUND, "other").SerializeToString()):
        error = errors.from_rpc_error(_Call(_Code.UNAVAILABLE, "gone", (("grpc-status-details-bin", trailer),)))
        assert type(error) is errors.Unavailable
        assert error.message == "gone"


@given(st.binary(max_size=200))
def test_no_details_trailer_breaks_the_mapping(trailer: bytes) -> None:
    error = errors.from_rpc_error(_Call(_Code.NOT_FOUND, "gone", (("grpc-status-details-bin", trailer),)))
    assert error.code is _Code.NOT_FOUND


def test_one_malformed_detail_does_not_hide_the_others() -> None:
    mixed = status(_Code.FAILED_PRECONDITION, "why", info("x"), info("READ_ONLY"))
    mixed.details[0].value = b"\xff\xff"
    assert type(errors.from_status(mixed)) is errors.ReadOnly


def test_retryable_says_whether_the_same_request_may_succeed_later() -> None:
    retryable = {kind.__name__ for kind in _tree(errors.MemshardError) if kind.retryable}
    assert retryable == {"Unavailable", "OutcomeUnknown", "DeadlineExceeded", "ResourceExhausted"}


def test_errors_travel_between_processes() -> None:
    error = errors.from_status(status(_Code.FAILED_PRECONDITION, "why", info("READ_ONLY")))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.ReadOnly
    assert copy.__dict__ == error.__dict__


def test_every_class_is_exported_and_shown_in_the_tree() -> None:
    for kind in _tree(errors.MemshardError):
        assert getattr(memshard, kind.__name__) is kind
        assert kind.__name__ in (errors.__doc__ or "")


def _tree(kind: type[errors.MemshardError]) -> list[type[errors.MemshardError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]
