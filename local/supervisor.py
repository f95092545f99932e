"""The supervisor: owns every process of the cluster from their start to their end, in the order of what they need."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import psutil

from local import logs
from local.errors import LocalClusterError, StartError, StepError
from local.layout import Layout
from local.process import Child, ProcessSpec
from local.state import ProcessState, State, TopologyState

# Seconds in which the next process must become ready, before the start is given up.
START_TIMEOUT_S = 60.0
# A server that replays its log after a crash gets this long.
RECOVERY_TIMEOUT_S = 600.0
# Deaths of one process at the start after which more would not help.
MAX_EARLY_DEATHS = 5

_WATCH_INTERVAL_S = 0.25
_READY_INTERVAL_S = 0.02
_LOG_CHECK_INTERVAL_S = 60.0
_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class Step:
    """Something to be done once while the cluster starts, like making a database."""

    name: str
    run: Callable[[], Awaitable[None]]
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class Hooks:
    """What the supervisor tells while it works."""

    progress: Callable[[str], None] = field(default=lambda _name: None)
    """The named process or step is ready."""
    ready: Callable[[], None] = field(default=lambda: None)
    """Everything is."""
    stopping: Callable[[], None] = field(default=lambda: None)
    """The end has begun."""


class Supervisor:
    """Starts processes and steps as soon as what they need is ready, and ends everything when told to stop."""

    def __init__(  # noqa: PLR0913  # What it runs, and whom it tells.
        self,
        layout: Layout,
        specs: Sequence[ProcessSpec],
        steps: Sequence[Step] = (),
        background: Sequence[Callable[[], Awaitable[None]]] = (),
        *,
        addresses: Sequence[str] = (),
        topology: Callable[[], TopologyState | None] = lambda: None,
        hooks: Hooks | None = None,
        log: logging.Logger | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._layout = layout
        self._steps = steps
        self._addresses = list(addresses)
        self._topology = topology
        self._hooks = hooks or Hooks()
        self._log = log or logging.getLogger("memshard.supervisor")
        self._start_timeout_s = start_timeout_s
        self._children = [Child(spec, self.save_state, self._log) for spec in specs]
        self._background = background
        self._gates = {child.spec.name: child.ready for child in self._children} | {
            step.name: asyncio.Event() for step in steps
        }
        self._stop = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._looking_after: dict[str, list[asyncio.Task[None]]] = {}
        self._waiting: set[asyncio.Task[None]] = set()
        self._left_out: set[str] = set()

    def process(self, name: str) -> Child | None:
        """A process by its name."""
        return next((child for child in self._children if child.spec.name == name), None)

    def processes(self) -> Sequence[Child]:
        """All of them."""
        return self._children

    async def add(
        self,
        name: str,
        specs: Sequence[ProcessSpec],
        steps: Sequence[Step],
        background: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        """Starts more processes while the cluster runs, and returns when they are ready. `name` is what `remove` knows
        the background work by.

        Raises StartError when they do not become ready; those that were started are ended then.
        """
        assert self._group is not None, "there is nothing to add to yet"
        children = [Child(spec, self.save_state, self._log) for spec in specs]
        self._children += children
        self._gates |= {child.spec.name: child.ready for child in children}
        self._gates |= {step.name: asyncio.Event() for step in steps}
        for child in children:
            self._group.create_task(self._run_child(child))
        tasks = [self._group.create_task(self._keep_doing(work)) for work in background]
        self._looking_after.setdefault(name, []).extend(tasks)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await asyncio.gather(*(self._run_step(step) for step in steps))
                await asyncio.gather(*(child.ready.wait() for child in children if child.spec.required()))
        except TimeoutError as error:
            late = next((child for child in children if not child.ready.is_set()), None)
            failure = StartError(f"{name} is not ready after {self._start_timeout_s:.0f} s")
            if late is not None:
                failure = self._start_error(late, f"is not ready after {self._start_timeout_s:.0f} s")
            await self.remove(name, [child.spec.name for child in children])
            raise failure from error
        except BaseException:
            await self.remove(name, [child.spec.name for child in children])
            raise

    async def remove(self, name: str, processes: Iterable[str]) -> None:
        """Ends some processes for good, and the background work that was added with `name`."""
        names = set(processes)
        for task in self._looking_after.pop(name, []):
            task.cancel()
        going = [child for child in self._children if child.spec.name in names]
        self._children = [child for child in self._children if child.spec.name not in names]
        for _, children in groupby(sorted(going, key=_stop_order), key=_stop_order):
            await asyncio.gather(*(child.stop() for child in children))
        self.save_state()

    def stop(self) -> None:
        """Asks `run` to end everything and return."""
        self._stop.set()

    async def run(self) -> None:
        """Starts everything, keeps it running until `stop`, ends everything.

        Raises StartError (or what a step raised) when something did not become ready; everything is ended then too.
        """
        failure: BaseException | None = None
        async with asyncio.TaskGroup() as group:
            self._group = group
            for child in self._children:
                group.create_task(self._run_child(child))
            group.create_task(self._bound_logs())
            background = [group.create_task(self._keep_doing(work)) for work in self._background]
            try:
                if await self._start():
                    self._log.info("ready")
                    self._hooks.ready()
                    await self._stop.wait()
            except LocalClusterError as error:
                if not isinstance(error, StepError):
                    self._log.error("%s", error)
                failure = error
            finally:
                self._hooks.stopping()
                for task in (*background, *(task for tasks in self._looking_after.values() for task in tasks)):
                    task.cancel()
                await self._end_all()
        if failure is not None:
            raise failure

    async def _start(self) -> bool:
        """Waits until everything is ready; False when told to stop before."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._watch_start())]
                tasks += [group.create_task(self._run_step(step)) for step in self._steps]
                tasks += [group.create_task(self._tell(name)) for name in self._gates]
                everything = group.create_task(self._await_everything())
                stop = group.create_task(self._stop.wait())
                await asyncio.wait([everything, stop], return_when=asyncio.FIRST_COMPLETED)
                for task in (*tasks, everything, stop):
                    task.cancel()
        except* LocalClusterError as failures:
            raise _first(failures) from failures
        return not self._stop.is_set()

    async def _run_child(self, child: Child) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        await self._await_ready(child.spec.needs)
        self._waiting.discard(task)
        await child.run()

    async def _run_step(self, step: Step) -> None:
        await self._await_ready(step.needs)
        began = time.monotonic()
        try:
            await step.run()
        except LocalClusterError:
            raise
        except Exception as error:
            self._log.exception("%s failed by a bug", step.name)
            raise StepError(f"{step.name} failed: {error or type(error).__name__}") from error
        self._log.info("%s done in %.2f s", step.name, time.monotonic() - began)
        self._gates[step.name].set()

    async def _tell(self, name: str) -> None:
        await self._gates[name].wait()
        self._hooks.progress(name)

    async def _await_ready(self, names: Iterable[str]) -> None:
        for name in names:
            await self._gates[name].wait()

    async def _await_everything(self) -> None:
        """Returns when all is ready that is required, and the rest is too or has been left out."""
        names = {child.spec.name: child for child in self._children}
        while not all(  # noqa: ASYNC110  # What is required may change with a failover.
            gate.is_set() or self._is_left_out(names.get(name)) for name, gate in self._gates.items()
        ):
            await asyncio.sleep(_READY_INTERVAL_S)

    def _is_left_out(self, child: Child | None) -> bool:
        return child is not None and child.spec.name in self._left_out and not child.spec.required()

    def _leave_out(self, child: Child, why: str) -> None:
        """Does not wait for it any more; it goes on being started."""
        if child.spec.name not in self._left_out:
            self._left_out.add(child.spec.name)
            self._log.warning("ready without %s: it %s", child.spec.name, why)

    async def _keep_doing(self, work: Callable[[], Awaitable[None]]) -> None:
        """A bug in what looks after the processes must not end them."""
        while True:
            try:
                await work()
            except Exception:
                self._log.exception("a background task failed by a bug")
            await asyncio.sleep(_WATCH_INTERVAL_S)

    async def _watch_start(self) -> None:
        """Raises StartError when a required process keeps dying, or nothing has become ready for too long."""
        began = progress_at = time.monotonic()
        ready = 0
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            for child in self._children:
                if child.early_deaths >= MAX_EARLY_DEATHS and not child.ready.is_set():
                    if child.spec.required():
                        raise self._start_error(child, child.last_end)
                    self._leave_out(child, child.last_end)
            now = time.monotonic()
            count = sum(gate.is_set() for gate in self._gates.values())
            if count > ready or (now - began < RECOVERY_TIMEOUT_S and await self._recovers()):
                ready, progress_at = count, now
            if now - progress_at >= self._start_timeout_s:
                late = [child for child in self._children if not child.ready.is_set()]
                if any(child.spec.required() for child in late) or not late:
                    self._raise_not_ready()
                for child in late:
                    self._leave_out(child, f"is not ready after {self._start_timeout_s:.0f} s")

    async def _recovers(self) -> bool:
        for child in self._children:
            if not child.ready.is_set() and child.spec.recovers is not None and await child.spec.recovers():
                return True
        return False

    def _raise_not_ready(self) -> None:
        for child in self._children:  # In the order of what needs what: the first one holds up the others.
            if not child.ready.is_set() and all(self._gates[need].is_set() for need in child.spec.needs):
                how = f"; it {child.last_end}" if child.last_end else ""
                raise self._start_error(child, f"is not ready after {self._start_timeout_s:.0f} s{how}")
        unfinished = [name for name, gate in self._gates.items() if not gate.is_set()]
        raise StartError(f"not ready after {self._start_timeout_s:.0f} s: {', '.join(unfinished)}")

    def _start_error(self, child: Child, how: str) -> StartError:
        return StartError(
            f"{child.spec.name} did not start: it {how}. Its log: {child.spec.log}",
            logs.tail(child.spec.log, _TAIL_LINES),
        )

    async def _end_all(self) -> None:
        self._stop.set()
        self._log.info("stopping")
        for task in self._waiting:  # What was not started yet is not started any more.
            task.cancel()
        for _, children in groupby(sorted(self._children, key=_stop_order), key=_stop_order):
            await asyncio.gather(*(child.stop() for child in children))
        self.save_state()
        self._log.info("stopped")

    async def _bound_logs(self) -> None:
        while not self._stop.is_set():
            for name in ("supervisor", *(child.spec.name for child in self._children)):
                logs.bound(self._layout.log(name))
            try:
                async with asyncio.timeout(_LOG_CHECK_INTERVAL_S):
                    await self._stop.wait()
            except TimeoutError:
                continue

    def save_state(self) -> None:
        """Writes the state file. A full disk must not end the supervisor, which finds its children without it."""
        own = psutil.Process()
        supervisor = ProcessState(name="supervisor", role="supervisor", pid=os.getpid(), created_at=own.create_time())
        processes = [supervisor, *(child.state() for child in self._children)]
        try:
            State(addresses=self._addresses, processes=processes, topology=self._topology()).save(self._layout)
        except OSError as error:
            self._log.warning("%s cannot be written: %s", self._layout.state, error.strerror)


def _stop_order(child: Child) -> int:
    return child.spec.stop_order


def _first(failures: BaseExceptionGroup[LocalClusterError]) -> LocalClusterError:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, LocalClusterError)
    return error
