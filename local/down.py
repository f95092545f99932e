"""`memshard down`: the end of a cluster, whoever started it and whatever became of its supervisor."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass

from local import leftovers, lock
from local.errors import AlreadyRunningError, LocalClusterError
from local.layout import Layout
from local.state import load_state

# More than the sum of what the supervisor gives its processes, one group after the other.
SUPERVISOR_TIMEOUT_S = 90.0
_KILL_TIMEOUT_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there was to end."""

    supervisor: bool
    leftovers: int


async def down(layout: Layout) -> Outcome:
    """Ends the supervisor and all its processes, and what an earlier supervisor left. Raises LocalClusterError."""
    if not layout.root.is_dir():
        return Outcome(supervisor=False, leftovers=0)
    supervisor = await _end_supervisor(layout)
    if not layout.lock.exists():
        return Outcome(supervisor, leftovers=0)
    with lock.held(layout, within_s=_KILL_TIMEOUT_S):
        ended = await leftovers.end_all(layout.root)
        if ended:
            idle = [
                process.model_copy(update={"pid": None, "created_at": None}) for process in load_state(layout).processes
            ]
            load_state(layout).model_copy(update={"processes": idle}).save(layout)
    return Outcome(supervisor, ended)


async def _end_supervisor(layout: Layout) -> bool:
    """Whether there was one."""
    holder = lock.holder(layout)
    if holder is None:
        return False
    for number, timeout_s in ((signal.SIGTERM, SUPERVISOR_TIMEOUT_S), (signal.SIGKILL, _KILL_TIMEOUT_S)):
        deadline = time.monotonic() + timeout_s
        told: int | None = None
        while (holder := lock.holder(layout)) is not None:
            if holder.pid is not None and holder.pid != told:
                _signal(holder.pid, number)
                told = holder.pid
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(_POLL_S)
        else:
            return True
    raise AlreadyRunningError(f"the supervisor of {layout.root} does not end{holder or ''}")


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise LocalClusterError(f"the supervisor (pid {pid}) belongs to another user") from error
