"""One supervised process: started when what it needs is there, started again when it dies, ended in its own way."""

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil

from local import logs
from local.account import Account, run_as
from local.backoff import Backoff
from local.errors import LocalClusterError
from local.state import ProcessState, Role

_PROBE_INTERVAL_S = 0.05
_KILL_TIMEOUT_S = 10.0
# What a service needs before it listens: its database, the catalog, a model in memory.
_SUCCESSOR_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What a process is."""

    name: str
    role: Role
    command: tuple[str, ...]
    port: int
    cwd: Path
    log: Path
    environment: Mapping[str, str] = field(repr=False)
    probe: Callable[[], Awaitable[bool]]
    """Whether it is healthy."""
    stop_timeout_s: float
    stop_signal: signal.Signals = signal.SIGTERM
    urgent_signal: signal.Signals = signal.SIGKILL
    """What it gets when it has not ended in time. SIGKILL follows."""
    shard_id: str | None = None
    account: Account | None = None
    needs: tuple[str, ...] = ()
    """Names of the processes and steps that must be ready before it starts."""
    stop_order: int = 0
    """Processes of a lower order are ended first."""
    fence: Callable[[], Awaitable[None]] | None = None
    """Returns when nothing is left of the process. Run before each start and after the end."""
    recovers: Callable[[], Awaitable[bool]] | None = None
    """Whether it is at work on becoming ready and needs more time."""
    prepare: Callable[[], Awaitable[None]] | None = None
    """What is done before each start, once nothing is left of the process. It may take its time."""
    died: Callable[[], Awaitable[None]] | None = None
    """What is done at once when it has ended by itself, before it is started again."""
    hangs: Callable[[], Awaitable[bool]] | None = None
    """Whether it takes connections and answers nothing, for one that may be ended for that."""
    current_role: Callable[[], Role] | None = None
    """Its role now, of a process whose role changes."""
    handover_variable: str = ""
    """Variable that names the file by which a successor, started beside it, says that it listens on the same port.
    Empty: it can have none."""
    required: Callable[[], bool] = lambda: True
    """Whether the cluster is not ready without it."""


class Child:
    """One process under supervision. `changed` is called after each start and end."""

    def __init__(self, spec: ProcessSpec, changed: Callable[[], None], log: logging.Logger) -> None:
        self.spec = spec
        self.ready = asyncio.Event()
        """Set once it has been healthy."""
        self.early_deaths = 0
        """How often it died, or could not be started, before it was ever healthy."""
        self.last_end = ""
        """How it ended last, for people."""
        self._changed = changed
        self._log = log
        self._backoff = Backoff()
        self._process: asyncio.subprocess.Process | None = None
        self._successor: asyncio.subprocess.Process | None = None
        self._created_at: float | None = None
        self._stopping = asyncio.Event()
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._interrupted = asyncio.Event()
        """Set when we end it, or keep it from being started; until the next start begins."""

    def state(self) -> ProcessState:
        """What is known of it now."""
        process, spec = self._process, self.spec
        pid = process.pid if process is not None and process.returncode is None else None
        return ProcessState(
            name=spec.name,
            role=spec.current_role() if spec.current_role is not None else spec.role,
            shard_id=spec.shard_id,
            pid=pid,
            created_at=self._created_at if pid is not None else None,
            port=spec.port,
        )

    async def run(self) -> None:
        """Keeps it running until `stop`."""
        while not self._stopping.is_set():
            self._interrupted.clear()
            try:
                await self._run_once()
                await self._unless_interrupted(self.spec.died)
            except (OSError, LocalClusterError) as error:
                self._ended(f"could not be started: {error}")
            if not self._interrupted.is_set():
                delay_s = self._backoff.died()
                self._log.warning("%s %s; next start in %.1f s", self.spec.name, self.last_end, delay_s)
                await self._pause(delay_s)
            while not self._allowed.is_set():
                await self._allowed.wait()
        await self._discard_successor()

    async def stop(self) -> None:
        """Ends it: its stop signal, a bounded wait, then harder ones. Returns when it is gone."""
        self._stopping.set()
        self._allowed.set()
        await self._end()

    async def hold(self) -> None:
        """Ends it, and keeps it from being started again until `release`. Returns when it is gone."""
        self._allowed.clear()
        await self._end()

    def release(self) -> None:
        """Lets it be started again."""
        self._allowed.set()

    async def restart(self) -> None:
        """Ends it; it is started again at once."""
        await self.hold()
        self.release()

    async def hand_over(self) -> None:
        """Starts its successor beside it, and ends it once that listens too, so that somebody always does.

        Raises LocalClusterError when the successor does not come so far; it goes on then.
        """
        assert self.spec.handover_variable
        if self._process is None or self._process.returncode is not None or self._successor is not None:
            raise LocalClusterError(f"{self.spec.name} does not run, or is being restarted already")
        file = self.spec.log.with_suffix(".handover")
        file.unlink(missing_ok=True)
        self._successor = successor = await self._spawn({self.spec.handover_variable: str(file)})
        try:
            await self._until_it_listens(successor, file)
        except BaseException:
            await self._discard_successor()
            raise
        finally:
            file.unlink(missing_ok=True)
        self._log.info("%s has a successor, pid %d", self.spec.name, successor.pid)
        await self._end()

    def kill(self, pid: int) -> None:
        """Ends it at once, if it is still the process with that pid; it is started again like any that died."""
        process = self._process
        if process is not None and process.returncode is None and process.pid == pid:
            process.kill()

    async def _end(self) -> None:
        self._interrupted.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        spec = self.spec
        began = time.monotonic()
        for number, timeout_s in (
            (spec.stop_signal, spec.stop_timeout_s),
            (spec.urgent_signal, _KILL_TIMEOUT_S),
            (signal.SIGKILL, _KILL_TIMEOUT_S),
        ):
            if await _ended_by(process, number, timeout_s):
                self._log.info("%s ended in %.1f s (%s)", spec.name, time.monotonic() - began, number.name)
                break
            self._log.error("%s did not end within %.0f s of %s", spec.name, timeout_s, number.name)
        if spec.fence is not None:
            try:
                await spec.fence()
            except LocalClusterError as error:
                self._log.error("%s: %s", spec.name, error)

    async def _run_once(self) -> None:
        if self.spec.fence is not None:
            await self.spec.fence()
        await self._unless_interrupted(self.spec.prepare)
        if self._interrupted.is_set():
            return
        self._process = process = self._successor or await self._spawn()
        self._successor = None
        self._created_at = _create_time(process.pid)
        self._log.info("%s started, pid %d, port %d", self.spec.name, process.pid, self.spec.port)
        self._changed()
        async with asyncio.TaskGroup() as group:
            health = group.create_task(self._watch_health())
            if self._interrupted.is_set():  # Told to stop while it was being started.
                group.create_task(self._end())
            code = await process.wait()
            health.cancel()
        self._ended(_describe(code))

    async def _until_it_listens(self, successor: asyncio.subprocess.Process, file: Path) -> None:
        """Returns when the successor has said that it listens. Raises LocalClusterError."""
        name = self.spec.name
        try:
            async with asyncio.timeout(_SUCCESSOR_TIMEOUT_S):
                while not _exists(file):  # Nothing tells us; we have to look.
                    if successor.returncode is not None:
                        raise LocalClusterError(f"a new {name} {_describe(successor.returncode)}; the old one goes on")
                    await asyncio.sleep(_PROBE_INTERVAL_S)
        except TimeoutError:
            raise LocalClusterError(
                f"a new {name} was not ready after {_SUCCESSOR_TIMEOUT_S:.0f} s; the old one goes on"
            ) from None

    async def _discard_successor(self) -> None:
        """Ends the successor, if there is one that has not taken its place."""
        successor, self._successor = self._successor, None
        if successor is not None and successor.returncode is None:
            successor.kill()
            await successor.wait()

    async def _spawn(self, more: Mapping[str, str] = MappingProxyType({})) -> asyncio.subprocess.Process:
        spec = self.spec
        output = logs.open_for(spec.log)
        try:
            return await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=spec.cwd,
                env={**spec.environment, **more},
                start_new_session=True,  # A Ctrl-C at the terminal is for the supervisor alone.
                **run_as(spec.account),
            )
        finally:
            os.close(output)

    async def _watch_health(self) -> None:
        began = time.monotonic()
        while not await self.spec.probe():  # noqa: ASYNC110  # Nothing tells us; we have to ask.
            await asyncio.sleep(_PROBE_INTERVAL_S)
        self._backoff.healthy()
        self._log.info("%s is healthy after %.2f s", self.spec.name, time.monotonic() - began)
        self.ready.set()

    def _ended(self, how: str) -> None:
        self.last_end = how
        if not self.ready.is_set():
            self.early_deaths += 1
        self._changed()

    async def _unless_interrupted(self, work: Callable[[], Awaitable[None]] | None) -> None:
        """Does `work`, if any; it is cancelled when the process is to be held, or the end begins."""
        if work is None or self._interrupted.is_set():
            return
        doing = asyncio.ensure_future(work())
        interrupted = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait([doing, interrupted], return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
        finally:
            for task in (doing, interrupted):
                task.cancel()
            await asyncio.gather(doing, interrupted, return_exceptions=True)

    async def _pause(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._interrupted.wait()
        except TimeoutError:
            return


async def _ended_by(process: asyncio.subprocess.Process, number: signal.Signals, timeout_s: float) -> bool:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return True
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return False
    return True


def _create_time(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _exists(file: Path) -> bool:
    return file.exists()


def _describe(code: int) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with exit code {code}"
