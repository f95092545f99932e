"""`/metrics`: what this process counts, and what it looks up when it is asked, for Prometheus.

The page is served by prometheus-client from a thread, so that it answers while the event loop is busy. What collectors
read belongs to the event loop, so they run there, and only there.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import TimeoutError as LookTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.registry import Collector

from common import logs
from common.config import ServiceSettings
from common.lifecycle import StartError
from common.telemetry.registry import REGISTRY

if TYPE_CHECKING:
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

_log = logs.get_logger("metrics")

Look = Callable[[], Iterable[Metric]]
"""Reads what there is at this moment, without waiting for anything."""

# Below the 10 s that Prometheus waits by default. An event loop that is later than this is hung: the counts are served
# without what would have to be looked up.
_LOOK_TIMEOUT_S = 5.0
# Between two tries to take the port over. Nobody scrapes more often than once a second.
_TAKEOVER_INTERVAL_S = 0.25


class _OnLoop(Collector):
    """Runs looks on the event loop, for whoever asks in a thread."""

    def __init__(self, looks: Sequence[Look], loop: asyncio.AbstractEventLoop) -> None:
        self._looks = looks
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Nothing: it is not known before somebody looks."""
        return ()

    def collect(self) -> Iterable[Metric]:
        asked = asyncio.run_coroutine_threadsafe(self._collect(), self._loop)
        try:
            return asked.result(_LOOK_TIMEOUT_S)
        except LookTimeoutError:
            asked.cancel()
            return ()

    async def _collect(self) -> list[Metric]:
        found: list[Metric] = []
        for look in self._looks:
            try:
                found.extend(look())
            except Exception as bug:  # One that fails must not take the others' metrics with it.
                _log.error("a look for metrics failed by a bug", **logs.describe_bug(bug))
        return found


class Exposition:
    """The page of this process, while it is entered; no page without a port.

    A successor that takes a service's ports over waits for that of the page: its predecessor may be looked at until it
    has drained.
    """

    def __init__(
        self, settings: ServiceSettings, looks: Sequence[Look], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._host, self._port = settings.metrics_host, settings.metrics_port
        self._is_successor = settings.handover_file is not None
        self._looks = looks
        self._registry = registry
        self._serving: tuple[WSGIServer, Thread, _OnLoop] | None = None
        self._takeover: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        """Raises StartError when the port cannot be had, unless a predecessor may have it."""
        if self._port is None:
            return
        try:
            self._serve(self._port)
        except OSError as error:
            if not self._is_successor:
                raise StartError(
                    f"cannot listen on {self._host}:{self._port} for metrics: is something else using the port?"
                ) from error
            self._takeover = asyncio.create_task(self._take_over(self._port))

    async def __aexit__(self, *_: object) -> None:
        if self._takeover is not None:
            self._takeover.cancel()
            await asyncio.gather(self._takeover, return_exceptions=True)
        if self._serving is None:
            return
        server, thread, looks = self._serving
        self._registry.unregister(looks)
        # In a thread, since a page that is being made waits for this loop.
        await asyncio.to_thread(_stop, server, thread)

    def _serve(self, port: int) -> None:
        server, thread = start_http_server(port, self._host, self._registry)
        looks = _OnLoop(self._looks, asyncio.get_running_loop())
        self._registry.register(looks)
        self._serving = server, thread, looks
        _log.info("metrics", address=f"{self._host}:{port}")

    async def _take_over(self, port: int) -> None:
        _log.info("waiting for the port of metrics", port=port)
        while self._serving is None:
            await asyncio.sleep(_TAKEOVER_INTERVAL_S)
            with suppress(OSError):
                self._serve(port)


def _stop(server: "WSGIServer", thread: "Thread") -> None:
    server.shutdown()
    server.server_close()
    thread.join()
