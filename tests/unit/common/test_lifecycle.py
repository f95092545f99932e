"""A service process from start to drain, seen from outside: signals, exit codes, health, and what callers get."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from memshard.v1 import memory_pb2 as pb
from memshard.v1 import memory_pb2_grpc
from tests.support.eventually import eventually

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

_ROOT = Path(__file__).resolve().parents[3]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Longer than any test may take: a drain that only ends by running out of time is seen.
_DRAIN_TIMEOUT_S = 120


@dataclass(frozen=True)
class _Service:
    process: Process
    folder: Path
    port: int
    channel: grpc.aio.Channel

    @property
    def memories(self) -> "MemoryServiceAsyncStub":
        return memory_pb2_grpc.MemoryServiceStub(self.channel)

    def watch(self, service: str = "") -> Any:
        """The stream of a service's health."""
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        return stub.Watch(health_pb2.HealthCheckRequest(service=service))

    async def output(self) -> str:
        """What the process wrote, once it is over."""
        out, err = await self.process.communicate()
        return (out + err).decode()


@asynccontextmanager
async def _started(folder: Path, port: int | None = None, **settings: object) -> AsyncIterator[_Service]:
    """The service of `waiting_service.py` on a free port; killed at the end if it is still there."""
    port = port or _free_port()
    settings = {"port": port, "catalog_dsn": "postgresql://nowhere", "drain_timeout_s": _DRAIN_TIMEOUT_S, **settings}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.unit.common.waiting_service", str(folder)),
        cwd=_ROOT,
        env={**os.environ, **{f"MEMSHARD_ROUTER_{name.upper()}": str(value) for name, value in settings.items()}},
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        # Connection attempts every 100 ms, since nobody listens at first.
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
        async with asyncio.timeout(60), grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield _Service(process, folder, port, channel)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@asynccontextmanager
async def _serving(folder: Path) -> AsyncIterator[_Service]:
    async with _started(folder) as service:
        await service.channel.channel_ready()
        yield service


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_sigterm_drains(tmp_path: Path) -> None:
    """Health first, then no new calls, while the one in flight ends with its answer; then the process is gone."""
    async with _serving(tmp_path) as service:
        health = service.watch()
        assert (await health.read()).status == _SERVING
        in_flight = asyncio.ensure_future(service.memories.GetMemory(pb.GetMemoryRequest(id="kept")))
        await eventually((tmp_path / "entered").exists)

        service.process.send_signal(signal.SIGTERM)

        assert (await health.read()).status == _NOT_SERVING
        await eventually(lambda: _refused(service))
        assert not in_flight.done()
        (tmp_path / "release").touch()
        assert (await in_flight).memory.id == "kept"
        assert "stopped" in await service.output()
        assert service.process.returncode == 0


async def test_those_who_watch_its_health_do_not_hold_up_the_drain(tmp_path: Path) -> None:
    """A watch never ends by itself; a service that is watched must stop as fast as any other."""
    async with _serving(tmp_path) as service:
        watches = [service.watch(name) for name in ("", "memshard.v1.MemoryService", "no.such.Service")]
        for watch in watches:
            await watch.read()
        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(_DRAIN_TIMEOUT_S / 4):
            assert await service.process.wait() == 0
        assert [(await watch.read()).status for watch in watches[:2]] == [_NOT_SERVING] * 2


async def _refused(service: _Service) -> bool:
    try:
        await service.memories.DeleteMemory(pb.DeleteMemoryRequest())
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


async def test_call_that_outlasts_the_drain_is_cut_off(tmp_path: Path) -> None:
    async with _started(tmp_path, drain_timeout_s=0.2) as service:
        call = service.memories.GetMemory(pb.GetMemoryRequest(), wait_for_ready=True)
        in_flight = asyncio.ensure_future(call)
        await eventually((tmp_path / "entered").exists)
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError):
            await in_flight
        assert await service.process.wait() == 0


async def test_sigint_drains_too(tmp_path: Path) -> None:
    async with _serving(tmp_path) as service:
        await eventually(lambda: _is_serving(service))
        service.process.send_signal(signal.SIGINT)
        output = await service.output()
        assert service.process.returncode == 0
        assert "Traceback" not in output


async def _is_serving(service: _Service) -> bool:
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    return bool((await stub.Check(health_pb2.HealthCheckRequest())).status == _SERVING)


async def test_second_service_on_a_port_exits_and_says_why(tmp_path: Path) -> None:
    async with _serving(tmp_path) as first, _started(tmp_path, port=first.port) as second:
        output = await second.output()
        assert second.process.returncode == 1
        assert f"cannot listen on 127.0.0.1:{first.port}: is something else using the port?" in output
        assert "Traceback" not in output
        assert first.process.returncode is None


async def test_bad_settings_exit_and_are_named(tmp_path: Path) -> None:
    async with _started(tmp_path, catalog_dsn="hunter2", log_level="loud") as service:
        output = await service.output()
        assert service.process.returncode == 1
        assert output.startswith("waiting: ")
        assert "catalog_dsn: must be a PostgreSQL URL" in output
        assert "log_level: " in output
        assert "hunter2" not in output


async def test_background_task_that_fails_takes_the_service_down(tmp_path: Path) -> None:
    """So that it is started again, rather than left half alive; drained, and without the text of its exception."""
    async with _serving(tmp_path) as service:
        in_flight = asyncio.ensure_future(service.memories.GetMemory(pb.GetMemoryRequest(id="kept")))
        await eventually((tmp_path / "entered").exists)
        (tmp_path / "break").touch()
        await eventually(lambda: _refused(service))
        (tmp_path / "release").touch()
        assert (await in_flight).memory.id == "kept"
        assert await service.process.wait() == 1
        output = await service.output()
        assert "RuntimeError" in output
        assert "told to" not in output


async def test_garbage_to_the_health_service_is_the_callers_fault(tmp_path: Path) -> None:
    async with _serving(tmp_path) as service:
        check: Any = service.channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await check(b"\xff\xff\xff")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_reflection_lists_the_services_and_has_their_contract(tmp_path: Path) -> None:
    async with _serving(tmp_path) as service:
        channel: Any = service.channel  # The type stubs know of blocking ones only.
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest
        requests = [ask(list_services=""), ask(file_containing_symbol="memshard.v1.MemoryService")]
        listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
        assert {found.name for found in listed.list_services_response.service} == {
            "memshard.v1.MemoryService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        assert pb.DESCRIPTOR.serialized_pb in described.file_descriptor_response.file_descriptor_proto


async def test_an_aged_connection_ends_in_order_and_its_calls_are_finished(tmp_path: Path) -> None:
    async with _started(tmp_path, max_connection_age_s=0.5) as service:
        await service.channel.channel_ready()
        in_flight = asyncio.ensure_future(service.memories.GetMemory(pb.GetMemoryRequest(id="kept")))
        await eventually((tmp_path / "entered").exists)
        async with asyncio.timeout(10):
            await service.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        assert not in_flight.done()
        (tmp_path / "release").touch()
        assert (await in_flight).memory.id == "kept"
        # The next call makes a connection of its own.
        await service.memories.DeleteMemory(pb.DeleteMemoryRequest())


async def test_a_successor_listens_before_its_predecessor_ends_and_nobody_is_refused_in_between(
    tmp_path: Path,
) -> None:
    old, new, file = tmp_path / "old", tmp_path / "new", tmp_path / "handover"
    old.mkdir()
    new.mkdir()
    (new / "release").touch()
    async with (
        _serving(old) as predecessor,
        _started(new, port=predecessor.port, handover_file=file) as successor,
        asyncio.TaskGroup() as group,
    ):
        knocking = group.create_task(_knock(predecessor.port))
        health = predecessor.watch()
        assert (await health.read()).status == _SERVING
        in_flight = asyncio.ensure_future(predecessor.memories.GetMemory(pb.GetMemoryRequest(id="kept")))
        await eventually((old / "entered").exists)
        await eventually(file.exists, within_s=20)
        assert _listens(predecessor)
        assert _listens(successor)
        await eventually(lambda: _reaches(new, predecessor.port), within_s=20)
        (new / "entered").unlink()

        predecessor.process.send_signal(signal.SIGTERM)
        assert (await health.read()).status == _NOT_SERVING
        # Calls are the successor's, while the old one has one to finish.
        await eventually(lambda: _reaches(new, predecessor.port), within_s=20)
        assert not in_flight.done()
        (old / "release").touch()
        assert (await in_flight).memory.id == "kept"
        assert await predecessor.process.wait() == 0
        (new / "entered").unlink()
        assert await _reaches(new, predecessor.port)
        knocking.cancel()


def _listens(service: _Service) -> bool:
    open_ = psutil.Process(service.process.pid).net_connections("tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == service.port for c in open_)


async def _knock(port: int) -> None:
    """One connection after the other, for ever. Raises ConnectionRefusedError when nobody listens."""
    while True:
        # One that the predecessor had not accepted yet is reset, which clients take for a first try.
        with suppress(ConnectionResetError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()


async def _reaches(folder: Path, port: int) -> bool:
    """Whether a call on a connection of its own has come to the service of that folder."""
    # Channels with equal options would share a connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub: MemoryServiceAsyncStub = memory_pb2_grpc.MemoryServiceStub(channel)
        with suppress(grpc.aio.AioRpcError):
            await stub.GetMemory(pb.GetMemoryRequest(), timeout=1.0)
    return (folder / "entered").exists()


async def test_a_successor_too_says_that_the_port_is_a_strangers(tmp_path: Path) -> None:
    """Who does not share the port is no predecessor."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        async with _started(tmp_path, port=port, handover_file=tmp_path / "handover") as service:
            output = await service.output()
    assert service.process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: is something else using the port?" in output
    assert not (tmp_path / "handover").exists()


async def test_a_service_on_every_address_does_not_start_on_a_port_that_another_has_on_one(tmp_path: Path) -> None:
    async with _serving(tmp_path) as first, _started(tmp_path, port=first.port, host="0.0.0.0") as second:
        output = await second.output()
        assert second.process.returncode == 1
        assert f"cannot listen on 0.0.0.0:{first.port}: is something else using the port?" in output
