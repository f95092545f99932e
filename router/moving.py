"""What a router knows of moves of slots: read after the topology, and told to operators. Nothing is routed by it."""

import asyncio
import time
from collections.abc import Callable

import asyncpg

from common import logs
from common.catalog_moves import read_progress
from common.moves import Progress
from common.postgres import Connection

_log = logs.get_logger("moving")

_TIMEOUT_S = 2.0
# The catalog may be older than this router, the table locked, the role one that may read the topology only. A
# connection that is lost is noticed by the next look at the topology.
_EXPECTED = (TimeoutError, asyncpg.PostgresError)


class Moving:
    """The moves, as the catalog last told them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress = Progress()
        self._clock = clock
        self._told_at: float | None = None
        self._warned = False

    @property
    def age_s(self) -> float | None:
        """Seconds since the catalog told. None: it never has."""
        return None if self._told_at is None else self._clock() - self._told_at

    async def look(self, connection: Connection) -> None:
        """Asks the catalog. What cannot be read stays as it was told last."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                self.progress = await read_progress(connection)
        except _EXPECTED as error:
            if not self._warned:
                _log.warning("moves of slots cannot be read from the catalog", error=type(error).__name__)
            self._warned = True
        else:
            self._told_at = self._clock()
            self._warned = False
