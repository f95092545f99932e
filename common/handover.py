"""Taking a port over from a predecessor: a process waits, with everything else done, until the port is free.

gRPC lets a port go at the beginning of a drain. So what callers notice of a restart is the time between two looks here,
and one connection made anew.
"""

import asyncio
import socket
import time
from pathlib import Path

from common import logs

_log = logs.get_logger("handover")

_INTERVAL_S = 0.005
# A predecessor has to be told to end, and its port for operators is free when all of its calls have ended.
_TIMEOUT_S = 60.0


async def wait_for_port(host: str, port: int, ready: Path) -> None:
    """Returns when the port is free, or nobody has let it go for a minute. Makes the file `ready` first."""
    deadline = time.monotonic() + _TIMEOUT_S
    _make(ready)
    if _is_free(host, port):
        return
    _log.info("waiting for the port", port=port)
    while time.monotonic() < deadline:
        await asyncio.sleep(_INTERVAL_S)
        if _is_free(host, port):
            return


def _make(file: Path) -> None:
    file.touch()


def _is_free(host: str, port: int) -> bool:
    """Whether it can be listened on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As gRPC does: connections of the predecessor that are still closing are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError:
            return False
    return True
