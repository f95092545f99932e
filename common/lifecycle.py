"""The life of a service process: listen, be healthy, and on SIGTERM drain before leaving.

Draining: health turns NOT_SERVING first, so that balancers look elsewhere; then no new call is taken, and those in
flight have `drain_timeout_s` to finish.
"""

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from typing import Any

import grpc
import uvloop
from grpc_reflection.v1alpha import reflection

from common import handover, health, logs
from common.config import ConfigError, ServiceSettings
from common.methods import Methods

_log = logs.get_logger("lifecycle")

EXIT_FAILED = 1
_BESIDE_GRACE_S = 0.5


class StartError(Exception):
    """The service cannot start; the message says why and what to do."""


class StopError(Exception):
    """The service stopped by itself, because part of it failed; its log says where."""


class Listener:
    """A gRPC server on one port with health and reflection, NOT_SERVING until told otherwise."""

    def __init__(
        self,
        settings: ServiceSettings,
        offered: Sequence[Methods],
        *,
        port: int | None = None,
        host: str | None = None,
    ) -> None:
        host = settings.host if host is None else host
        # A bare IPv6 address has colons of its own.
        self._host, self._port = host.strip("[]"), settings.port if port is None else port
        host = f"[{host}]" if ":" in host and "[" not in host else host
        self._address = f"{host}:{self._port}"
        self._is_successor = settings.handover_file is not None
        service_names = [methods.service for methods in offered]
        self._health = health.Health(service_names)
        self._serving: bool | None = None
        self._server = grpc.aio.server(
            options=[
                # For a successor on the same port, and for nobody else: see `start`.
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Lets clients keep idle connections alive with pings more often than gRPC's five minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                *_connection_age(settings.max_connection_age_s),
            ]
        )
        for methods in (*offered, self._health.methods()):
            methods.add_to(self._server)
        reflection.enable_server_reflection(
            (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> None:
        """Listens; a successor beside its predecessor. Raises StartError when the port cannot be had."""
        await self.set_serving(False)
        try:
            with nullcontext() if self._is_successor else handover.claimed(self._host, self._port):
                self._server.add_insecure_port(self._address)
        except (OSError, RuntimeError) as error:
            raise StartError(f"cannot listen on {self._address}: is something else using the port?") from error
        await self._server.start()
        _log.info("listening", address=self._address)

    async def set_serving(self, serving: bool) -> None:
        """Tells health checks whether calls can be answered."""
        if serving == self._serving:
            return
        self._serving = serving
        self._health.set(serving)
        _log.info("health changed", serving=serving, address=self._address)

    async def drain(self, timeout_s: float) -> None:
        """Says that it leaves, takes no new call, and gives those in flight their time."""
        self._health.stop()
        await self._server.stop(timeout_s)


def _connection_age(max_age_s: float | None) -> list[tuple[str, int]]:
    """gRPC's options for it. It spreads the ends by a tenth; calls may take as long as they like."""
    return [] if max_age_s is None else [("grpc.max_connection_age_ms", round(max_age_s * 1000))]


class Server(Listener):
    """The listener that a service is there for. SIGTERM and SIGINT stop it, and with it the listener `beside` it."""

    def __init__(
        self,
        settings: ServiceSettings,
        offered: Sequence[Methods],
        *,
        beside: Listener | None = None,
    ) -> None:
        super().__init__(settings, offered)
        self._drain_timeout_s = settings.drain_timeout_s
        self._handover_file = settings.handover_file
        self._beside = beside
        self._stop = asyncio.Event()

    async def start(self) -> None:
        """Listens, and a successor says so then. Raises StartError when a port cannot be had."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        # What there is now stays to the end. Looking through it again and again is most of what a full collection
        # does: 50 to 150 ms in which no call is answered, a few times a minute. The last one is before the first call.
        gc.collect()
        gc.freeze()
        await super().start()
        if self._beside is not None:
            await self._beside.start()
            await self._beside.set_serving(True)
        if self._handover_file is not None:
            self._handover_file.touch()

    async def run_until_stopped(self, background: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        """Runs the background tasks until SIGTERM or SIGINT, then drains.

        A background task that ends takes the service down, drained all the same: it is restarted rather than left half
        alive. Raises StopError then.
        """
        tasks = [asyncio.create_task(work()) for work in background]
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for failed in done - {stop}:
            if error := failed.exception():
                _log.error("a background task failed by a bug", **logs.describe_bug(error))
        await self._drain()
        for task in (stop, *tasks):
            task.cancel()
        await asyncio.gather(stop, *tasks, return_exceptions=True)
        if stop not in done:
            raise StopError

    async def _drain(self) -> None:
        _log.info("draining", timeout_s=self._drain_timeout_s)
        await self.drain(self._drain_timeout_s)
        if self._beside is not None:
            # Last, so that a drain can be looked at.
            await self._beside.drain(_BESIDE_GRACE_S)
        _log.info("stopped")


def run(service: str, load: Callable[[], ServiceSettings], main: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Entry point of a service process: loads settings, runs `main(settings)` on uvloop, exits 1 if it cannot start."""
    try:
        settings = load()
    except ConfigError as error:
        print(f"{service}: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    logs.configure(service, settings.log_format, settings.log_level)
    try:
        uvloop.run(main(settings))
    except StartError as error:
        _log.error("cannot start", why=str(error))
        sys.exit(EXIT_FAILED)
    except StopError:
        sys.exit(EXIT_FAILED)
