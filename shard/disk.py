"""How much room is left where the database keeps its data, if that is on this machine and it is told where."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from common import logs

_log = logs.get_logger("disk")

_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Room:
    """Of a file system, in bytes; all 0 when it is not known."""

    size_bytes: int = 0
    free_bytes: int = 0
    """Free for others than root."""


class Disk:
    """Looks every few seconds, beside all calls: a file system that hangs must not hang those who ask."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.room = Room()
        """As of the last look."""

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            if self._path is not None:
                self.room = await asyncio.to_thread(_look, self._path)
            await asyncio.sleep(_EVERY_S)


def _look(path: Path) -> Room:
    try:
        found = os.statvfs(path)
    except OSError as error:
        _log.warning("the data's disk cannot be looked at", error=type(error).__name__)
        return Room()
    return Room(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)
