"""The one retry of both clients comes when the service says, and not at all when that is too late."""

import asyncio
import select
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from common import errors
from common.deadline import Deadline
from common.rpc import methods_of
from common.status import pushback_ms
from memshard import AsyncMemoryClient, MemoryClient, OutcomeUnknown, Unavailable
from memshard.v1 import memory_pb2 as pb
from tests.support.eventually import eventually

_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]


class _FailsFirst:
    """A service whose first call fails, and that knows when it was called."""

    def __init__(self, error: errors.MemshardError) -> None:
        self.calls: list[float] = []
        self._error = error

    async def GetMemory(self, request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:  # noqa: N802
        self.calls.append(time.monotonic())
        if len(self.calls) == 1:
            raise self._error
        return pb.GetMemoryResponse(memory=pb.Memory(id=request.id))


class _Answers:
    async def GetMemory(self, request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:  # noqa: N802
        return pb.GetMemoryResponse(memory=pb.Memory(id=request.id))


@asynccontextmanager
async def _serving(service: object, port: int = 0) -> AsyncIterator[str]:
    server = grpc.aio.server()
    methods_of(_SERVICE, service, default_deadline_s=60).add_to(server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _get(address: str, timeout_s: float) -> None:
    async with AsyncMemoryClient(address, timeout_s=timeout_s) as client:
        await client.get("i")


async def _get_blocking(address: str, timeout_s: float) -> None:
    def get() -> None:
        with MemoryClient(address, timeout_s=timeout_s) as client:
            client.get("i")

    await asyncio.to_thread(get)


both = pytest.mark.parametrize("get", [_get, _get_blocking])
Get = Callable[[str, float], Awaitable[None]]


@both
async def test_the_retry_waits_as_long_as_the_service_says(get: Get) -> None:
    service = _FailsFirst(errors.Unavailable("not now", retry_after_s=0.5))
    async with _serving(service) as address:
        await get(address, 10)
    first, second = service.calls
    assert 0.5 <= second - first < 2


@both
async def test_no_retry_that_would_come_after_the_deadline(get: Get) -> None:
    service = _FailsFirst(errors.OutcomeUnknown("not now", retry_after_s=3.0))
    async with _serving(service) as address:
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown) as caught:
            await get(address, 2)
    # At once, and with what the service said.
    assert time.monotonic() - began < 1
    assert (len(service.calls), caught.value.retry_after_s) == (1, 3.0)


@both
async def test_no_retry_where_the_wait_is_the_callers_to_decide(get: Get) -> None:
    service = _FailsFirst(errors.Unavailable("not now", retry_after_s=3600))
    async with _serving(service) as address:
        with pytest.raises(Unavailable):
            await get(address, 7200)
    assert len(service.calls) == 1


@both
async def test_the_retry_comes_after_the_connection_has_been_tried_again(get: Get) -> None:
    """A router that ends resets the connections that it has not accepted yet, though its successor listens already."""
    for _ in range(5):
        with socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            door.bind(("127.0.0.1", 0))
            door.listen()
            port = door.getsockname()[1]
            getting = asyncio.ensure_future(get(f"127.0.0.1:{port}", 10))
            await eventually(lambda: select.select([door], [], [], 0)[0])
            async with _serving(_Answers(), port):
                door.close()
                await getting


@pytest.mark.parametrize(
    ("retry_after_s", "remaining_s", "expected"),
    [(1, 10, 1000), (0, 10, 0), (0.0004, 1, 0), (5, 10, 5000), (5.1, 10, -1), (1, 1, -1), (1, 0, -1), (1, None, 1000)],
)
def test_pause_is_in_milliseconds_and_within_the_deadline(
    retry_after_s: float, remaining_s: float | None, expected: int
) -> None:
    assert pushback_ms(retry_after_s, remaining_s) == expected
