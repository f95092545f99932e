"""Who is ended for not answering: not before its time, not by a supervisor that was away, and not all at once."""

import asyncio
import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from local.layout import Layout
from local.process import ProcessSpec
from local.silence import DEFAULT_HUNG_AFTER_S, INTERVAL_S, Silences, SilenceWatch
from local.supervisor import Supervisor
from tests.support.clock import Clock
from tests.support.eventually import eventually

LOOKS = int(DEFAULT_HUNG_AFTER_S / INTERVAL_S)


def looked(silences: Silences, clock: Clock, silent: dict[str, int], times: int) -> list[str]:
    """Whom so many looks, at the usual pace, have ended."""
    return [name for _, name in ended(silences, clock, silent, times)]


def ended(silences: Silences, clock: Clock, silent: dict[str, int], times: int) -> list[tuple[float, str]]:
    """The same, and when."""
    found = []
    for _ in range(times):
        if (name := silences.looked(silent)) is not None:
            found.append((clock(), name))
        clock.pass_(INTERVAL_S)
    return found


def test_one_is_ended_after_its_time_and_not_before() -> None:
    clock = Clock()
    silences = Silences(DEFAULT_HUNG_AFTER_S, clock)
    assert looked(silences, clock, {"router-0": 7}, LOOKS) == []
    assert looked(silences, clock, {"router-0": 7}, 1) == ["router-0"]


def test_an_answer_or_another_process_begins_its_time_anew() -> None:
    clock = Clock()
    silences = Silences(DEFAULT_HUNG_AFTER_S, clock)
    looked(silences, clock, {"router-0": 7}, LOOKS)
    looked(silences, clock, {}, 1)
    assert looked(silences, clock, {"router-0": 7}, LOOKS) == []
    assert looked(silences, clock, {"router-0": 8}, LOOKS) == []


def test_time_in_which_nobody_looked_does_not_count() -> None:
    clock = Clock()
    silences = Silences(DEFAULT_HUNG_AFTER_S, clock)
    assert looked(silences, clock, {"router-0": 7}, 1) == []
    clock.pass_(3600)
    assert looked(silences, clock, {"router-0": 7}, 2) == []


def test_when_everything_is_silent_one_is_ended_a_minute_and_each_once_in_five() -> None:
    clock = Clock()
    silences = Silences(DEFAULT_HUNG_AFTER_S, clock)
    names = {"redis": 1, "router-0": 2, "shard-0": 3}
    found = ended(silences, clock, names, int(280 / INTERVAL_S))
    assert [name for _, name in found] == ["redis", "router-0", "shard-0"]
    assert all(later - earlier >= 60 for (earlier, _), (later, _) in pairwise(found))


async def test_a_process_that_is_silent_is_another_one_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local.silence.INTERVAL_S", 0.1)
    layout = Layout.of(tmp_path)
    layout.claim()
    layout.make_directories()
    silent: set[int] = set()

    def pid() -> int:
        processes = json.loads(layout.state.read_text())["processes"]
        return next(int(process["pid"]) for process in processes if process["name"] == "it" and process["pid"])

    async def is_up() -> bool:
        return True

    async def hangs() -> bool:
        return pid() in silent

    spec = ProcessSpec(
        name="it",
        role="shard",
        command=("/bin/sleep", "3600"),
        port=1,
        cwd=layout.run,
        log=layout.log("it"),
        environment={},
        probe=is_up,
        stop_timeout_s=5.0,
        hangs=hangs,
    )
    supervisor = Supervisor(layout, [spec])
    running = asyncio.create_task(supervisor.run())
    await eventually(pid)
    watch = asyncio.create_task(SilenceWatch(supervisor.processes, supervisor._log, 0.5).run())
    first = pid()
    os.kill(first, signal.SIGSTOP)
    silent.add(first)
    await eventually(lambda: pid() != first)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    supervisor.stop()
    await asyncio.wait_for(running, 20)
