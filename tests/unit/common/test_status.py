"""Domain errors to gRPC statuses and back: nothing is lost on the way, and noise does no harm."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.errors import FieldViolation, MemshardError
from common.status import from_rpc_error, to_status

_DETAILS_KEY = "grpc-status-details-bin"


def _tree(kind: type[MemshardError]) -> list[type[MemshardError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


_CLASSES = [kind for kind in _tree(MemshardError) if kind not in (MemshardError, errors.WrongShard)]
_TEXTS = st.text(max_size=30)
_FAULTS = st.builds(FieldViolation, _TEXTS, _TEXTS)


def _answered(status: status_pb2.Status) -> grpc.aio.AioRpcError:
    """What a caller gets for a call that ended with this status."""
    sent = rpc_status.to_status(status)
    return _failed(sent.code, sent.details, *sent.trailing_metadata)


def _failed(code: grpc.StatusCode, details: str, *trailers: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


@given(
    kind=st.sampled_from(_CLASSES),
    message=_TEXTS.filter(bool),
    reason=st.none() | st.from_regex(r"[A-Z]([A-Z_]{0,20}[A-Z])?", fullmatch=True),
    violations=st.lists(_FAULTS, max_size=3).map(tuple),
    retry_after_ms=st.none() | st.integers(0, 86_400_000),
    metadata=st.dictionaries(_TEXTS, _TEXTS, max_size=3),
)
def test_every_error_comes_back_as_it_was_raised(
    kind: type[MemshardError],
    message: str,
    reason: str | None,
    violations: tuple[FieldViolation, ...],
    retry_after_ms: int | None,
    metadata: dict[str, str],
) -> None:
    if reason in {other.default_reason for other in _CLASSES}:
        reason = None  # The reason of another class makes it that class.
    if kind in (errors.Ambiguous, errors.ReadOnly, errors.VersionMismatch, errors.OutcomeUnknown):
        reason = None  # What makes them more than their code is their reason.
    retry_after_s = None if retry_after_ms is None else retry_after_ms / 1000
    error = kind(message, reason=reason, violations=violations, retry_after_s=retry_after_s, metadata=metadata)
    status = to_status(error)
    assert status.code == kind.code.value[0]
    back = from_rpc_error(_answered(status))
    assert type(back) is kind
    # Whoever hears that something is unavailable hears when to come back.
    told_s = 1.0 if retry_after_s is None and isinstance(error, errors.Unavailable) else retry_after_s
    assert vars(back) == {**vars(error), "retry_after_s": told_s}


def test_wrong_shard_brings_its_epoch() -> None:
    back = from_rpc_error(_answered(to_status(errors.WrongShard("moved", epoch=12))))
    assert isinstance(back, errors.WrongShard)
    assert (back.epoch, back.message) == (12, "moved")


@pytest.mark.parametrize("epoch", ["", "soon", "-1", "1.5", "9" * 5000])
def test_wrong_shard_with_a_garbled_epoch_knows_none(epoch: str) -> None:
    status = to_status(errors.WrongShard("moved", epoch=12))
    info = error_details_pb2.ErrorInfo(domain="memshard", reason="WRONG_SHARD", metadata={"epoch": epoch})
    status.details[0].CopyFrom(_packed(info))
    back = from_rpc_error(_answered(status))
    assert isinstance(back, errors.WrongShard)
    assert back.epoch == 0


def test_unknown_reason_becomes_the_general_class_of_its_code() -> None:
    """A newer shard may have reasons that this router does not know."""
    for kind in (errors.FailedPrecondition, errors.Unavailable, errors.NotFound):
        back = from_rpc_error(_answered(to_status(kind("new", reason="NEW_IN_A_LATER_VERSION"))))
        assert type(back) is kind
        assert back.reason == "NEW_IN_A_LATER_VERSION"


def test_status_of_grpc_itself_is_no_domain_error() -> None:
    assert from_rpc_error(_failed(grpc.StatusCode.UNAVAILABLE, "connection refused")) is None


def test_status_of_another_domain_is_no_domain_error() -> None:
    info = error_details_pb2.ErrorInfo(domain="elsewhere.example", reason="WRONG_SHARD")
    assert from_rpc_error(_answered(status_pb2.Status(code=9, message="no", details=[_packed(info)]))) is None


@given(st.binary(max_size=100))
def test_garbage_details_are_no_domain_error(trailer: bytes) -> None:
    assert from_rpc_error(_failed(grpc.StatusCode.UNAVAILABLE, "gone", (_DETAILS_KEY, trailer))) is None


def test_details_of_another_status_are_no_domain_error() -> None:
    trailer = to_status(errors.NotFound("no such memory")).SerializeToString()
    assert from_rpc_error(_failed(grpc.StatusCode.UNAVAILABLE, "gone", (_DETAILS_KEY, trailer))) is None


def test_one_garbled_detail_does_not_hide_the_others() -> None:
    error = errors.Unavailable("gone", violations=(FieldViolation("f", "d"),), retry_after_s=1.0)
    for garbled in range(3):
        status = to_status(error)
        status.details[garbled].value = b"\xff\xff"
        back = from_rpc_error(_answered(status))
        if garbled == 0:  # Without the reason there is nothing to know it by.
            assert back is None
        else:
            assert type(back) is errors.Unavailable
            assert (back.violations, back.retry_after_s) == (((), 1.0) if garbled == 1 else (error.violations, None))


def test_every_class_is_shown_in_the_tree() -> None:
    for kind in _tree(MemshardError):
        assert kind.__name__ in (errors.__doc__ or "")
