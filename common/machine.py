"""How busy the machine is that a process runs on, or the share of it that its container may use.

A container sees the whole machine in /proc, so where its control group has a limit, it is the limit that counts: Linux'
Documentation/admin-guide/cgroup-v2.rst, "cpu.max", "cpu.stat", "memory.max". Memory in use is counted as the kubelet
counts it, without file pages that have not been used lately, which the kernel takes back as it needs them.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = "max"
_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of what there is, 0 to 1."""

    cpu: float
    """Since the look before."""
    memory: float


class Machine:
    """Looks at how busy it is. The first look's `cpu` is of no time at all, and 0."""

    def __init__(self, cgroup: Path = _CGROUP, clock: Callable[[], float] = time.monotonic) -> None:
        self._cgroup = cgroup
        self._clock = clock
        self._used: tuple[float, float] | None = None
        """When the container was last looked at, and the seconds of CPU that it had used by then."""
        psutil.cpu_percent()  # Each is about the time since the one before.

    def look(self) -> Busy:
        """How busy it is now."""
        cpu, memory = self._container_cpu(), self._container_memory()
        return Busy(
            psutil.cpu_percent() / 100 if cpu is None else cpu,
            psutil.virtual_memory().percent / 100 if memory is None else memory,
        )

    def _container_cpu(self) -> float | None:
        """None where there is no limit."""
        try:
            quota, period = (self._cgroup / "cpu.max").read_text().split()
            used_s = _field(self._cgroup / "cpu.stat", "usage_usec") / 1e6
        except (OSError, ValueError, LookupError):
            return None
        now, before = self._clock(), self._used
        self._used = now, used_s
        if quota == _NO_LIMIT:
            return None
        if before is None or now <= before[0]:
            return 0.0
        cores = int(quota) / int(period)
        return min(1.0, (used_s - before[1]) / (now - before[0]) / cores)

    def _container_memory(self) -> float | None:
        """None where there is no limit."""
        try:
            limit = (self._cgroup / "memory.max").read_text().strip()
            if limit == _NO_LIMIT:
                return None
            current = int((self._cgroup / "memory.current").read_text())
            return min(1.0, max(0, current - _field(self._cgroup / "memory.stat", "inactive_file")) / int(limit))
        except (OSError, ValueError, LookupError, ZeroDivisionError):
            return None


class Watch:
    """Looks once a second, beside all who ask: what CPU was used since somebody else asked says little."""

    def __init__(self, machine: Machine | None = None) -> None:
        self._machine = machine or Machine()
        self.busy = Busy(0.0, 0.0)
        """As of the last look."""

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            self.busy = self._machine.look()
            await asyncio.sleep(_EVERY_S)


def _field(file: Path, name: str) -> int:
    """A number of a file of names and numbers. LookupError when it is not in there."""
    for line in file.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    raise LookupError(name)
