"""The metrics page: what is on it, what it does when a look fails or the service hangs, and a port that is taken."""

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import GaugeMetricFamily
from structlog.testing import capture_logs

from common.config import RouterSettings
from common.lifecycle import StartError
from common.telemetry import exposition
from common.telemetry.exposition import Exposition
from tests.support.cluster import free_port
from tests.support.eventually import eventually


def settings(port: int | None, **others: Any) -> RouterSettings:
    return RouterSettings(catalog_dsn="postgresql://u@h/d", metrics_port=port, **others)  # type: ignore[arg-type]  # As read.


def get(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("counted", "Counted.", registry=made).inc()
    return made


def gauge(value: float) -> Iterable[Metric]:
    return [GaugeMetricFamily("looked_up", "Looked up.", value=value)]


async def test_the_page_has_what_is_counted_and_what_is_looked_up_on_the_event_loop() -> None:
    port, loop = free_port(), asyncio.get_running_loop()

    def look() -> Iterable[Metric]:
        assert asyncio.get_running_loop() is loop
        return gauge(3)

    async with Exposition(settings(port), [look], registry()):
        page = await asyncio.to_thread(get, port)
    assert "\ncounted_total 1.0\n" in page
    assert "\nlooked_up 3.0\n" in page
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(get, port)


async def test_a_look_that_fails_takes_no_other_with_it() -> None:
    port = free_port()

    def fail() -> Iterable[Metric]:
        yield from gauge(1)
        raise ValueError("hunter2")

    with capture_logs() as lines:
        async with Exposition(
            settings(port), [fail, lambda: [GaugeMetricFamily("other", "Other.", value=1)]], registry()
        ):
            page = await asyncio.to_thread(get, port)
    assert "\nother 1.0\n" in page
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["a look for metrics failed by a bug"]
    assert "hunter2" not in str(lines)


async def test_a_service_that_hangs_still_says_what_it_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "_LOOK_TIMEOUT_S", 0.2)
    port = free_port()
    async with Exposition(settings(port), [lambda: gauge(1)], registry()):
        asked = asyncio.create_task(asyncio.to_thread(get, port))
        await asyncio.sleep(0)
        time.sleep(1.0)  # The event loop hangs.
        page = await asked
    assert "counted_total 1.0" in page
    assert "looked_up" not in page


async def test_a_port_that_is_taken_is_said_and_no_port_is_no_page() -> None:
    port = free_port()
    async with Exposition(settings(port), [], registry()), Exposition(settings(None), [], registry()):
        with pytest.raises(StartError, match=f"{port} for metrics"):
            await Exposition(settings(port), [], registry()).__aenter__()


async def test_a_successor_starts_while_its_predecessor_has_the_page_and_takes_it_over(tmp_path: Path) -> None:
    port, new = free_port(), CollectorRegistry()

    async def is_taken_over() -> bool:
        return "looked_up 2.0" in await asyncio.to_thread(get, port)

    predecessor = Exposition(settings(port), [lambda: gauge(1)], registry())
    await predecessor.__aenter__()
    async with Exposition(settings(port, handover_file=tmp_path / "ready"), [lambda: gauge(2)], new):
        assert not await is_taken_over()
        await predecessor.__aexit__()
        await eventually(is_taken_over, within_s=5)


async def test_a_successor_that_never_gets_the_page_leaves_it_alone(tmp_path: Path) -> None:
    port = free_port()
    async with Exposition(settings(port), [], registry()):
        async with Exposition(settings(port, handover_file=tmp_path / "ready"), [], registry()):
            pass
        assert "counted_total" in await asyncio.to_thread(get, port)
