"""Which users have an index of their own, and whether there is one of all memories: what a shard or a replica remembers
of its database's catalog.

A statement is right whether the index is there or not, so that what is remembered may be some seconds old.
"""

import asyncio
import hashlib
from dataclasses import dataclass

import asyncpg

from common import logs
from common.deadline import Deadline
from common.errors import MemshardError
from shard.database import Database

_log = logs.get_logger("own indexes")

_EVERY_S = 2.0
_TIMEOUT_S = 10.0

FEW, MANY = 10, 100
"""Results for which recall is measured. A search for more than MANY is exact."""

# As many candidates as an unmeasured index is looked through for, and pgvector's most.
_UNMEASURED_EF = 100
_MAX_EF = 1000
# What a filter is applied to where less than the recall promised will do.
_FILTERED = 500

_READ = """
SELECT user_hash, key, ef_few, ef_many FROM own_indexes
JOIN pg_index ON indexrelid = to_regclass(name) WHERE indisvalid
"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a search by the index looks."""

    ef: int
    """Candidates that are kept while the graph is walked (`hnsw.ef_search`)."""

    candidates: int
    """How many of the nearest are taken from the index; a filter is applied to them."""


@dataclass(frozen=True, slots=True)
class OwnIndex:
    """A user's index. `key` is what its predicate says of the user."""

    key: int | None
    """None: that of all memories."""
    ef_few: int | None
    """Effort that FEW results have been found with as well as an exact search finds them; None: no effort is known."""
    ef_many: int | None
    """The same of MANY."""

    def effort(self, k: int, *, filtered: bool, index_suffices: bool) -> Effort | None:
        """How to look for `k`; None: not here, but exactly. `index_suffices`: less than the recall promised will do."""
        if self.ef_few is not None and self.ef_many is not None and k <= MANY:
            if not filtered:
                return Effort(self.ef_few if k <= FEW else self.ef_many, k)
            if not index_suffices:
                return Effort(self.ef_many, MANY)
        if not index_suffices:
            return None
        candidates = max(k, _FILTERED) if filtered else k
        return Effort(min(max(_UNMEASURED_EF, 2 * candidates), _MAX_EF), candidates)


class OwnIndexes:
    """What is known. `run` keeps it fresh."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_user: dict[bytes, OwnIndex] = {}
        self.shared: OwnIndex | None = None
        """That of all memories, if there is one."""

    @property
    def count(self) -> int:
        """How many can be used."""
        return len(self._by_user)

    @property
    def proven(self) -> int:
        """How many of them are used at every level."""
        return sum(index.ef_few is not None and index.ef_many is not None for index in self._by_user.values())

    def of(self, user_id: str) -> OwnIndex | None:
        """The user's own index, if there is one."""
        if not self._by_user:
            return None
        return self._by_user.get(hashlib.sha256(user_id.encode()).digest())

    async def refresh(self) -> None:
        """Looks once. Raises MemshardError, TimeoutError, asyncpg.PostgresError."""
        deadline = Deadline.after(_TIMEOUT_S)
        async with deadline.bound(), self._database.reading(deadline) as connection:
            rows = await connection.fetch(_READ)
        known = {row["user_hash"]: OwnIndex(row["key"], row["ef_few"], row["ef_many"]) for row in rows}
        # A name has a hash, and no memories have none.
        self.shared = known.pop(b"", None)
        self._by_user = known

    async def run(self) -> None:
        """Looks until cancelled. What was known stays so while the database does not answer."""
        while True:
            try:
                await self.refresh()
            except (MemshardError, TimeoutError, asyncpg.PostgresError) as error:
                _log.info("not known anew", error=type(error).__name__)
            await asyncio.sleep(_EVERY_S)
