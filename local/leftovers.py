"""Finding and ending processes of a data directory that no supervisor looks after any more.

A pid in a file may by now be somebody else's. So processes are known by what the kernel says about them: a service by
the mark in its environment and its settings file, PostgreSQL and Redis by their program and working directory.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import psutil

from local.errors import LocalClusterError

# Set in the environment of every process that a supervisor starts, to the real path of its data directory.
MARK = "MEMSHARD_DATA_DIR_OWNER"

# A little more than the services' own bound for draining.
SERVICE_STOP_TIMEOUT_S = 15.0
REDIS_STOP_TIMEOUT_S = 5.0
# A fast shutdown writes a checkpoint first.
POSTGRES_STOP_TIMEOUT_S = 30.0
# Backends without a postmaster notice it when they next wait for something; one that computes does so later.
ORPHAN_GRACE_S = 1.0
_QUIT_TIMEOUT_S = 3.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.05

# The server, and what makes the directory of one.
_POSTGRES_PROGRAMS = frozenset({"postgres", "initdb", "pg_basebackup", "pg_rewind"})


class Kind(Enum):
    """What a process of ours is, as far as ending it goes."""

    SERVICE = auto()
    REDIS = auto()
    POSTMASTER = auto()
    BACKEND = auto()


@dataclass(frozen=True, slots=True)
class Seen:
    """What the kernel says about one process."""

    program: str
    cwd: str
    command: tuple[str, ...]
    mark: str | None


@dataclass(frozen=True, slots=True)
class Leftover:
    """A process of a data directory."""

    process: psutil.Process
    kind: Kind
    cwd: Path


def classify(seen: Seen, root: Path) -> Kind | None:
    """What `seen` is to the data directory `root`; None: nothing, hands off."""
    if seen.program in _POSTGRES_PROGRAMS and Path(seen.cwd).is_relative_to(root / "postgres"):
        # Backends rename themselves, to "postgres: …".
        return Kind.BACKEND if seen.command and seen.command[0].startswith("postgres: ") else Kind.POSTMASTER
    if seen.program == "redis-server" and Path(seen.cwd).is_relative_to(root / "redis"):
        return Kind.REDIS
    if seen.mark == str(root) and any(Path(part).parent == root / "config" for part in seen.command):
        return Kind.SERVICE
    return None


def find(root: Path) -> list[Leftover]:
    """The processes of the data directory `root` (a real path) that live now."""
    return [
        Leftover(process, kind, Path(seen.cwd))
        for process, seen in _visible()
        if (kind := classify(seen, root)) is not None
    ]


def find_postgres(pgdata: Path) -> list[psutil.Process]:
    """The processes of one PostgreSQL server, with or without their postmaster."""
    return [process for process, seen in _visible() if seen.program == "postgres" and Path(seen.cwd) == pgdata]


async def end_all(root: Path) -> int:
    """Ends every process of the data directory `root`: services, then Redis, then PostgreSQL.

    They get the time that an orderly end takes, then none. Returns how many there were, a server with its backends
    being one. Raises LocalClusterError when one survives.
    """
    found = find(root)
    for ended, number, timeout_s in (
        (Kind.SERVICE, signal.SIGTERM, SERVICE_STOP_TIMEOUT_S),
        (Kind.REDIS, signal.SIGTERM, REDIS_STOP_TIMEOUT_S),
        (Kind.POSTMASTER, signal.SIGINT, POSTGRES_STOP_TIMEOUT_S),
    ):

        def living(ended: Kind = ended) -> list[psutil.Process]:
            return [leftover.process for leftover in find(root) if leftover.kind is ended]

        if any(leftover.kind is ended for leftover in found):
            await _end(living, number, timeout_s)
    for pgdata in {leftover.cwd for leftover in find(root) if leftover.kind is Kind.BACKEND}:
        await fence(pgdata)
    leaders = [leftover for leftover in found if leftover.kind is not Kind.BACKEND]
    return len(leaders or found)


async def fence(pgdata: Path, grace_s: float = ORPHAN_GRACE_S) -> None:
    """Returns when no process of this PostgreSQL server is left. Call it when its postmaster is dead.

    A backend outlives a killed postmaster and may still acknowledge what it was doing; a new server beside it would be
    a second one on the same data. Raises LocalClusterError when one cannot be ended.
    """

    def living() -> list[psutil.Process]:
        return find_postgres(pgdata)

    if not await _gone(living, grace_s):
        await _end(living, signal.SIGQUIT, _QUIT_TIMEOUT_S)


async def kill(pgdata: Path) -> None:
    """Kills what is left of this PostgreSQL server, and returns when nothing is. Raises LocalClusterError."""
    await _end(lambda: find_postgres(pgdata), signal.SIGKILL, _KILL_TIMEOUT_S)


async def _end(living: Callable[[], list[psutil.Process]], number: signal.Signals, timeout_s: float) -> None:
    _signal(living(), number)
    if not await _gone(living, timeout_s):
        _signal(living(), signal.SIGKILL)
        if not await _gone(living, _KILL_TIMEOUT_S):
            raise LocalClusterError(
                f"process {living()[0].pid} does not end, not even by SIGKILL; is its disk all right?"
            )


async def _gone(living: Callable[[], list[psutil.Process]], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while living():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)  # psutil checks that the pid is still the same process.
        except psutil.NoSuchProcess:
            continue


def _visible() -> Iterator[tuple[psutil.Process, Seen]]:
    """Every process that we may look at; not the dead ones that wait for their parent, which have no program."""
    for pid in psutil.pids():
        try:
            # A fresh object: those of process_iter remember a program from before its exec.
            process = psutil.Process(pid)
            with process.oneshot():
                program = Path(process.exe()).name
                if not program:
                    continue
                seen = Seen(program, process.cwd(), tuple(process.cmdline()), process.environ().get(MARK))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        except OSError:  # A process that ends while it is being read.
            continue
        yield process, seen
