"""What takes a statement to find out, and so is asked for in the background: how much is stored, and what waits."""

import asyncio
from dataclasses import dataclass

import asyncpg

from common import logs
from common.deadline import Deadline
from common.errors import MemshardError
from shard.database import Database

_log = logs.get_logger("figures")

_EVERY_S = 15.0
_TIMEOUT_S = 10.0
# A queue that is longer is long.
_MOST_WAITING = 10_000

_LOOK = """
SELECT pg_database_size(current_database()) AS size_bytes,
       (SELECT count(*) FROM (
           SELECT FROM memories
           WHERE embedding IS NULL AND deleted_at IS NULL AND (expire_time IS NULL OR expire_time > now()) LIMIT $1
       ) AS waiting) AS waiting
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """As of the last look."""

    size_bytes: int
    waiting_for_embedding: int
    """At most 10,000."""


class FiguresWatch:
    """Looks a few times a minute. `figures` is None before the first look, and while the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.figures: Figures | None = None

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            try:
                deadline = Deadline.after(_TIMEOUT_S)
                async with deadline.bound(), self._database.reading(deadline) as connection:
                    row = await connection.fetchrow(_LOOK, _MOST_WAITING)
                assert row is not None
                self.figures = Figures(row["size_bytes"], row["waiting"])
            except (MemshardError, TimeoutError, asyncpg.PostgresError) as error:
                _log.info("the database cannot be measured now", error=type(error).__name__)
                self.figures = None
            await asyncio.sleep(_EVERY_S)
