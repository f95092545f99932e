"""Processes that are alive and answer nothing: after a while they are ended, and started again like any that died.

Only services and Redis, which lose nothing by it. A PostgreSQL server that hangs is left alone: nothing on one machine
can tell it from one that is slow, and what it has promised is on its disk (docs/replicas.md).
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from local.process import Child

DEFAULT_HUNG_AFTER_S = 30.0
"""Longer than a machine's hiccups last, and what people stop for a moment to look at it."""

INTERVAL_S = 3.0
# A whole machine that is out of breath makes everything silent. To restart all of it would not help.
_PAUSE_S = 60.0
_PAUSE_OF_ONE_S = 300.0


@dataclass(frozen=True, slots=True)
class _Silent:
    """Since when a process, known by its pid, has not answered, and how many looks long."""

    pid: int
    since: float
    looks: int


class Silences:
    """Who has been silent for long enough to be ended. Pure, but for its clock."""

    def __init__(self, hung_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._hung_after_s = hung_after_s
        # Time alone does not count: a supervisor that was itself stopped has not looked meanwhile.
        self._least_looks = max(2, math.ceil(hung_after_s / INTERVAL_S / 2))
        self._clock = clock
        self._silent: dict[str, _Silent] = {}
        self._ended_at: dict[str, float] = {}

    def looked(self, silent: Mapping[str, int]) -> str | None:
        """Takes a look into account: the pids of those that did not answer, by name. Whom to end now, if anybody."""
        now = self._clock()
        self._silent = {name: self._after(name, pid, now) for name, pid in silent.items()}
        if any(now - at < _PAUSE_S for at in self._ended_at.values()):
            return None
        for name, seen in sorted(self._silent.items(), key=lambda item: (item[1].since, item[0])):
            recently = now - self._ended_at.get(name, -math.inf) < _PAUSE_OF_ONE_S
            if now - seen.since >= self._hung_after_s and seen.looks >= self._least_looks and not recently:
                self._ended_at[name] = now
                return name
        return None

    def _after(self, name: str, pid: int, now: float) -> _Silent:
        before = self._silent.get(name)
        if before is None or before.pid != pid:
            return _Silent(pid, now, 1)
        return _Silent(pid, before.since, before.looks + 1)


class SilenceWatch:
    """Looks at the processes all the time."""

    def __init__(self, children: Callable[[], Iterable[Child]], log: logging.Logger, hung_after_s: float) -> None:
        self._children = children
        self._log = log
        self._hung_after_s = hung_after_s
        self._silences = Silences(hung_after_s)

    async def run(self) -> None:
        """Never returns. With a `hung_after_s` of 0 it looks at nothing."""
        if not self._hung_after_s:
            await asyncio.Event().wait()
        while True:
            began = time.monotonic()
            children = {
                child.spec.name: child for child in self._children() if child.spec.hangs and child.ready.is_set()
            }
            pids = await asyncio.gather(*map(_pid_if_silent, children.values()))
            silent = {name: pid for name, pid in zip(children, pids, strict=True) if pid is not None}
            name = self._silences.looked(silent)
            if name is not None:
                self._log.error(
                    "%s (pid %d) has not answered for %.0f s; ending it", name, silent[name], self._hung_after_s
                )
                children[name].kill(silent[name])
            await asyncio.sleep(max(0.0, began + INTERVAL_S - time.monotonic()))


async def _pid_if_silent(child: Child) -> int | None:
    pid = child.state().pid
    if pid is None or child.spec.hangs is None or not await child.spec.hangs():
        return None
    return pid
