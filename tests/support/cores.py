"""Two halves of the machine's cores, so that a load and what it loads are as on machines of their own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Halves:
    """The same one twice where there is one core only, or where processes cannot be bound to some."""

    first: frozenset[int]
    second: frozenset[int]


@contextmanager
def started_on(cores: frozenset[int]) -> Iterator[None]:
    """Processes that this one starts within run on these cores, and so do their children."""
    before = _of(0)
    bind(os.getpid(), cores)
    try:
        yield
    finally:
        bind(os.getpid(), before)


def halves() -> Halves:
    """Those of the cores that this process may use."""
    cores = sorted(_of(0))
    middle = len(cores) // 2
    return Halves(frozenset(cores[:middle] or cores), frozenset(cores[middle:]))


def bind(pid: int, cores: frozenset[int]) -> None:
    """Has a process that runs go on on these cores."""
    if hasattr(os, "sched_setaffinity"):
        # Each thread has its own.
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


def _of(pid: int) -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(pid))
    return frozenset(range(os.cpu_count() or 1))
