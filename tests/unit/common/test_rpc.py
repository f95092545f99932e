"""Handlers on the wire of a real server: whatever goes wrong ends in the one status that says so."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from common import errors
from common.deadline import Deadline
from common.rpc import methods_of
from memshard.v1 import memory_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
_SECRET = "hunter2"

Handler = Callable[[pb.GetMemoryRequest, Deadline], Awaitable[Any]]
Call = Callable[..., Any]


class _Servicer:
    """Offers one rpc of the service."""

    def __init__(self, handler: Handler) -> None:
        self.GetMemory = handler


@asynccontextmanager
async def _serving(handler: Handler, *, default_deadline_s: float = 60.0) -> AsyncIterator[Call]:
    """A server whose GetMemory is `handler`, and a function that calls one of its rpcs with bytes."""
    server = grpc.aio.server()
    servicer = _Servicer(handler)
    methods_of(_SERVICE, servicer, default_deadline_s=default_deadline_s).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        def call(request: bytes = b"", *, rpc: str = "GetMemory", timeout_s: float | None = None) -> Any:
            method: Any = channel.unary_unary(f"/{_SERVICE.full_name}/{rpc}")  # Without serialisers: bytes.
            return method(request, timeout=timeout_s)

        yield call
    await server.stop(None)


async def _answer(request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
    return pb.GetMemoryResponse(memory=pb.Memory(id=request.id))


async def _failure(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, machine reason and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status: Any = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # The asyncio error has what it needs.
    info = error_details_pb2.ErrorInfo()
    if status is not None:
        assert status.details[0].Unpack(info)
        assert info.domain == "memshard"
    return caught.value.code(), info.reason, caught.value.details() or ""


async def test_request_is_answered() -> None:
    async with _serving(_answer) as call:
        raw = await call(pb.GetMemoryRequest(id="zoë").SerializeToString())
    assert pb.GetMemoryResponse.FromString(raw).memory.id == "zoë"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"\xff\xff\xff", id="garbage"),
        pytest.param(b"\x0a\x05abc", id="cut short"),
        pytest.param(b"\x0a\x02\xff\xfe", id="not UTF-8"),
        pytest.param(b"\x22\xff\xff\xff\xff\x0f", id="a length beyond the end"),
    ],
)
async def test_malformed_request_is_the_callers_fault(request_bytes: bytes) -> None:
    async with _serving(_answer) as call:
        code, reason, message = await _failure(call(request_bytes))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "memshard.v1.GetMemoryRequest" in message


async def test_fields_of_a_newer_contract_are_ignored() -> None:
    async with _serving(_answer) as call:
        raw = await call(pb.GetMemoryRequest(id="a").SerializeToString() + b"\xf8\x3f\x01")
    assert pb.GetMemoryResponse.FromString(raw).memory.id == "a"


@pytest.mark.parametrize("bug", [ValueError, KeyError, AssertionError, RecursionError])
async def test_bug_is_internal_and_gives_nothing_away(
    bug: type[Exception], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def fail(request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        raise bug(f"content {_SECRET}")

    with capture_logs() as logged:
        async with _serving(fail) as call:
            code, reason, message = await _failure(call())
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    (line,) = logged
    assert line["rpc"] == "GetMemory"
    assert bug.__name__ in line["error"]
    assert "test_rpc.py" in line["at"]
    assert _SECRET not in message + str(logged) + caplog.text + "".join(capfd.readouterr())


async def test_handler_that_answers_nothing_is_a_bug() -> None:
    async def forget(request: pb.GetMemoryRequest, deadline: Deadline) -> None:
        return None

    with capture_logs():
        async with _serving(forget) as call:
            assert (await _failure(call()))[0] is grpc.StatusCode.INTERNAL


async def test_domain_error_is_its_status() -> None:
    async def refuse(request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        raise errors.InvalidArgument.field("memory.content", "INVALID_CONTENT", "must not be empty")

    with capture_logs() as logged:
        async with _serving(refuse) as call:
            code, reason, message = await _failure(call())
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONTENT")
    assert message == "memory.content: must not be empty"
    assert logged == []


async def test_rpc_that_is_not_offered_yet_is_unimplemented() -> None:
    async with _serving(_answer) as call:
        code, reason, message = await _failure(call(rpc="EraseUser"))
    assert (code, reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
    assert "memshard.v1.MemoryService.EraseUser" in message


async def test_rpc_that_the_contract_lacks_is_unimplemented() -> None:
    async with _serving(_answer) as call:
        assert (await _failure(call(rpc="DropTables")))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_call_without_a_deadline_gets_the_default() -> None:
    async def wait(request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        return await asyncio.Future()

    async with _serving(wait, default_deadline_s=0.05) as call:
        code, reason, _ = await _failure(call())
    assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_handler_knows_the_callers_deadline() -> None:
    seen: list[float] = []

    async def look(request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        seen.append(deadline.remaining_s())
        return pb.GetMemoryResponse()

    async with _serving(look, default_deadline_s=1000.0) as call:
        await call(timeout_s=30.0)
        await call()
    theirs, default = seen
    # Both ends read a clock of their own, a little apart.
    assert 20 < theirs < 40
    assert 900 < default <= 1000


async def test_cancelled_call_cancels_its_handler_and_is_no_bug() -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        entered.set()
        try:
            return await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with capture_logs() as logged:
        async with _serving(wait) as call, asyncio.timeout(10):
            pending = call()
            await entered.wait()
            pending.cancel()
            await cancelled.wait()
    assert logged == []
