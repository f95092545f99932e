import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from local.errors import LocalClusterError, StartError
from local.layout import Layout
from local.logs import supervisor_logger
from local.process import ProcessSpec
from local.supervisor import Hooks, Step, Supervisor
from tests.support.eventually import eventually

WAIT = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout.of(tmp_path)
    made.claim()
    made.make_directories()
    return made


def _spec(layout: Layout, name: str, code: str = WAIT, *, needs: tuple[str, ...] = (), order: int = 0) -> ProcessSpec:
    log = layout.log(name)

    async def is_up() -> bool:
        return log.exists() and "up" in log.read_text()

    return ProcessSpec(
        name=name,
        role="shard",
        command=(sys.executable, "-c", code),
        port=1,
        cwd=layout.run,
        log=log,
        environment={},
        probe=is_up,
        stop_timeout_s=5.0,
        needs=needs,
        stop_order=order,
    )


async def _never() -> bool:
    return False


def _pids(layout: Layout) -> dict[str, int | None]:
    processes = json.loads(layout.state.read_text())["processes"]
    return {process["name"]: process["pid"] for process in processes if process["name"] != "supervisor"}


async def _ended(supervisor: Supervisor, task: "asyncio.Task[None]") -> None:
    supervisor.stop()
    await asyncio.wait_for(task, 20)


async def test_things_start_after_what_they_need_and_end_before_it(
    layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "memshard.supervisor")
    told: list[str] = []
    ready = asyncio.Event()

    async def step() -> None:
        assert "up" in layout.log("database").read_text()
        assert not layout.log("service").exists()

    supervisor = Supervisor(
        layout,
        [_spec(layout, "service", needs=("step",)), _spec(layout, "database", order=1)],
        [Step("step", step, ("database",))],
        hooks=Hooks(told.append, ready.set),
    )
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    assert sorted(told) == ["database", "service", "step"]
    assert all(psutil.pid_exists(pid or 0) for pid in _pids(layout).values())
    await _ended(supervisor, task)
    assert _pids(layout) == {"service": None, "database": None}
    ends = [record.args[0] for record in caplog.records if "ended in" in record.msg and isinstance(record.args, tuple)]
    assert ends == ["service", "database"]


async def test_a_process_that_keeps_dying_fails_the_start_with_its_last_words(layout: Layout) -> None:
    supervisor = Supervisor(
        layout, [_spec(layout, "broken", "print('no such table'); raise SystemExit(3)"), _spec(layout, "good")]
    )
    with pytest.raises(StartError, match="broken did not start: it ended with exit code 3") as raised:
        await supervisor.run()
    assert "no such table" in raised.value.log_tail
    assert _pids(layout) == {"broken": None, "good": None}


async def test_a_program_that_does_not_exist_fails_the_start(layout: Layout) -> None:
    spec = replace(_spec(layout, "missing"), command=("/nonexistent/program",))
    with pytest.raises(StartError, match="could not be started"):
        await Supervisor(layout, [spec]).run()


async def test_what_never_becomes_healthy_fails_the_start_and_is_ended(layout: Layout) -> None:
    spec = replace(_spec(layout, "silent"), probe=_never)
    supervisor = Supervisor(layout, [spec, _spec(layout, "later", needs=("silent",))], start_timeout_s=0.5)
    with pytest.raises(StartError, match="silent did not start: it is not ready"):
        await supervisor.run()
    assert _pids(layout) == {"silent": None, "later": None}


async def test_a_server_at_work_on_its_recovery_gets_more_time(layout: Layout) -> None:
    until = time.monotonic() + 1.5

    async def is_up() -> bool:
        return time.monotonic() >= until

    async def recovers() -> bool:
        return time.monotonic() < until

    ready = asyncio.Event()
    spec = replace(_spec(layout, "database"), probe=is_up, recovers=recovers)
    supervisor = Supervisor(layout, [spec], hooks=Hooks(ready=ready.set), start_timeout_s=0.5)
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    await _ended(supervisor, task)


async def _raise_ours() -> None:
    raise LocalClusterError("the catalog says no")


async def _raise_bug() -> None:
    raise KeyError("x")


@pytest.mark.parametrize(("run", "said"), [(_raise_ours, "the catalog says no"), (_raise_bug, "step failed: 'x'")])
async def test_a_step_that_fails_ends_everything(layout: Layout, run: Callable[[], Awaitable[None]], said: str) -> None:
    supervisor = Supervisor(layout, [_spec(layout, "database")], [Step("step", run, ("database",))])
    with pytest.raises(LocalClusterError, match=said):
        await supervisor.run()
    assert _pids(layout) == {"database": None}


async def test_a_bug_is_in_the_log_by_its_type_and_place_and_not_by_what_it_says(layout: Layout) -> None:
    """Its text is for who has started the cluster."""
    log, handler = supervisor_logger(layout.log("supervisor"))
    failed = asyncio.Event()

    async def work() -> None:
        failed.set()
        raise ValueError("Alice drinks tea")

    async def step() -> None:
        await failed.wait()
        raise ValueError("Alice drinks tea")

    supervisor = Supervisor(layout, [], [Step("step", step)], background=[work], log=log)
    try:
        with pytest.raises(LocalClusterError, match="Alice drinks tea"):
            await supervisor.run()
    finally:
        log.removeHandler(handler)
        handler.close()
    text = layout.log("supervisor").read_text()
    assert "Alice" not in text
    bugs = [line for line in map(json.loads, text.splitlines()) if "error" in line]
    assert {line["event"] for line in bugs} == {"a background task failed by a bug", "step failed by a bug"}
    assert all(line["error"] == "builtins.ValueError" and "test_supervisor.py:" in line["at"] for line in bugs)


async def test_told_to_stop_while_it_starts_it_stops(layout: Layout) -> None:
    spec = replace(_spec(layout, "silent"), probe=_never)
    supervisor = Supervisor(layout, [spec, _spec(layout, "later", needs=("silent",))])
    task = asyncio.create_task(supervisor.run())
    pid = await eventually(lambda: _pids(layout)["silent"])
    await _ended(supervisor, task)
    assert not psutil.pid_exists(pid or 0)


async def test_a_dead_process_is_started_again(layout: Layout) -> None:
    ready = asyncio.Event()
    supervisor = Supervisor(layout, [_spec(layout, "service")], hooks=Hooks(ready=ready.set))
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    first = _pids(layout)["service"]
    assert first is not None
    psutil.Process(first).send_signal(signal.SIGKILL)
    await eventually(lambda: _pids(layout)["service"] not in (first, None))
    await _ended(supervisor, task)


async def test_a_process_that_is_held_stays_down_until_it_is_let_go(layout: Layout) -> None:
    died: list[str] = []
    ready = asyncio.Event()

    async def tell() -> None:
        died.append("service")

    supervisor = Supervisor(layout, [replace(_spec(layout, "service"), died=tell)], hooks=Hooks(ready=ready.set))
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    first = _pids(layout)["service"]
    service = supervisor.process("service")
    assert service is not None
    await service.hold()
    assert _pids(layout) == {"service": None}
    service.release()
    second = await eventually(lambda: _pids(layout)["service"])
    await service.restart()
    third = await eventually(lambda: _pids(layout)["service"])
    assert len({first, second, third}) == 3
    assert died == []  # It did not: we ended it.
    psutil.Process(third).send_signal(signal.SIGKILL)
    await eventually(lambda: died == ["service"])
    await _ended(supervisor, task)


async def test_what_is_prepared_is_prepared_before_each_start_and_not_after_the_end(layout: Layout) -> None:
    prepared: list[int] = []
    never = asyncio.Event()

    async def prepare() -> None:
        prepared.append(len(prepared))
        if len(prepared) == 2:
            await never.wait()

    ready = asyncio.Event()
    spec = replace(_spec(layout, "service"), prepare=prepare)
    supervisor = Supervisor(layout, [spec], hooks=Hooks(ready=ready.set))
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    psutil.Process(_pids(layout)["service"]).send_signal(signal.SIGKILL)
    await eventually(lambda: len(prepared) == 2)
    await _ended(supervisor, task)
    assert _pids(layout) == {"service": None}


async def test_the_cluster_is_ready_without_what_it_can_do_without(
    layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    ready = asyncio.Event()
    broken = replace(_spec(layout, "broken", "raise SystemExit(3)"), required=lambda: False)
    silent = replace(_spec(layout, "silent"), probe=_never, required=lambda: False)
    specs = [_spec(layout, "good"), broken, silent]
    supervisor = Supervisor(layout, specs, hooks=Hooks(ready=ready.set), start_timeout_s=3.0)
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    assert "ready without broken: it ended with exit code 3" in caplog.text
    assert "ready without silent: it is not ready after 3 s" in caplog.text
    await _ended(supervisor, task)


async def test_a_process_that_ignores_the_signal_is_killed(layout: Layout) -> None:
    ready = asyncio.Event()
    spec = replace(_spec(layout, "stubborn", STUBBORN), stop_timeout_s=0.3)
    supervisor = Supervisor(layout, [spec], hooks=Hooks(ready=ready.set))
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    await _ended(supervisor, task)
    assert _pids(layout) == {"stubborn": None}


async def test_a_state_file_that_cannot_be_written_does_not_end_the_supervisor(
    layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    layout.state.mkdir()
    ready = asyncio.Event()
    supervisor = Supervisor(layout, [_spec(layout, "service")], hooks=Hooks(ready=ready.set))
    task = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(ready.wait(), 20)
    await _ended(supervisor, task)
    assert "cannot be written" in caplog.text
