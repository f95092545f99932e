"""Large users get their indexes, and lose them, in the background, and so do all memories together where that is asked
for: one at a time, on the primary.
"""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from pgvector.asyncpg import register_vector

from common import logs
from common.config import ShardSettings
from common.postgres import CONNECT_ERRORS
from shard.identity import Identity
from shard.large_users import indexes, recall
from shard.large_users.known import OwnIndexes
from shard.large_users.plan import Bounds, LargeUser, decide, deserves_shared, has_drifted
from shard.primary import Primary

if TYPE_CHECKING:
    from shard.primary import PrimaryConnection

_log = logs.get_logger("own indexes")

_FIND_TIMEOUT_S = 10.0
# An index of a million memories takes its time, and waits for every transaction that is open. This is no bound for the
# work, but for what nobody would notice otherwise.
_LONGEST_S = 12 * 3600.0
# Counting everybody's memories must not be what the server does.
_MOST_OF_TIME = 0.01
_LEAST_PAUSE_S = 0.5
# What fails again and again, for want of disk or memory, is tried more seldom: so many intervals apart.
_LONGEST_BACKOFF = 16

_SETTINGS = {
    "application_name": "memshard own indexes",
    # A build whose maker has gone ends with it.
    "client_connection_check_interval": "500ms",
    # Nobody is told of an index before it is there, and what is lost of it is made again.
    "synchronous_commit": "local",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "jit": "off",
}


class Keeper:
    """Sees to the indexes. `owner` connects as the role that owns the tables, and is the keeper's alone."""

    def __init__(self, settings: ShardSettings, identity: Identity, owner: Primary, known: OwnIndexes) -> None:
        self._identity = identity
        self._owner = owner
        self.known = known
        """What the server that this is part of searches by."""
        self._bounds = Bounds(settings.own_index_memories, settings.own_index_most)
        self._interval_s = settings.own_index_interval_s
        self._memory_mb = settings.own_index_build_mb
        self._wants_shared = settings.shared_index
        self._all_rows = 0
        self._wake = asyncio.Event()
        self._rows: dict[int, int] = {}

    def erased(self, user_id: str) -> None:
        """A user's memories have gone, and an index of theirs should go at once."""
        if self.known.of(user_id) is not None:
            self._wake.set()

    async def run(self) -> None:
        """Looks until cancelled; a database that is away is tried again the next time."""
        failures = 0
        while True:
            began = time.monotonic()
            self._wake.clear()
            try:
                async with asyncio.timeout(_LONGEST_S):
                    await self._look()
                failures = 0
            except CONNECT_ERRORS as error:
                failures += 1
                _log.warning("put off", error=type(error).__name__)
            longer = min(2**failures, _LONGEST_BACKOFF)
            next_at = began + max(self._interval_s * longer, self._counting_s / _MOST_OF_TIME)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(_LEAST_PAUSE_S, next_at - time.monotonic())):
                    await self._wake.wait()

    _counting_s = 0.0

    async def _look(self) -> None:
        await self._owner.find(_FIND_TIMEOUT_S)
        connection = await self._owner.connect(server_settings=_SETTINGS)
        try:
            await register_vector(connection)
            async with indexes.alone(connection) as had:
                if had:
                    await self._tend(connection)
        finally:
            connection.terminate()

    async def _tend(self, connection: "PrimaryConnection") -> None:
        await indexes.tidy(connection)
        began = time.monotonic()
        users = await indexes.large_users(connection, self._identity, self._bounds) if self._bounds.most else []
        all_rows = await indexes.count_all(connection) if self._wants_shared else 0
        self._counting_s = time.monotonic() - began
        plan = decide(users, await indexes.existing(connection), self._bounds, self._rows)
        self._rows = {user.key: user.rows for user in users}
        for index in plan.drop:
            await indexes.drop(connection, index.name)
        for user in plan.measure:
            await self._measure(connection, user)
        for user in plan.build:
            await indexes.build(connection, self._identity, user, memory_mb=self._memory_mb)
            await self._measure(connection, user)
        await self._tend_shared(connection, all_rows)

    async def _tend_shared(self, connection: "PrimaryConnection", rows: int) -> None:
        """The same for the index of all memories."""
        there, measured = await indexes.shared(connection)
        wanted = self._wants_shared and deserves_shared(rows, self._all_rows, self._bounds, there=there)
        self._all_rows = rows
        if not wanted:
            if there:
                await indexes.drop(connection, indexes.SHARED)
            return
        if not there:
            # A move would have to wait for as long as that takes, which may be hours.
            if await indexes.has_moves(connection):
                return
            await indexes.build_shared(connection, self._identity, rows, memory_mb=self._memory_mb)
        if has_drifted(measured, rows):
            found = await recall.measure(connection, self._identity, None)
            await indexes.record_shared(connection, rows, found.ef_few, found.ef_many)
            _log.info("measured", rows=rows, ef_few=found.ef_few, ef_many=found.ef_many)

    async def _measure(self, connection: "PrimaryConnection", user: LargeUser) -> None:
        measured = await recall.measure(connection, self._identity, user)
        await indexes.record_measured(connection, user, measured.ef_few, measured.ef_many)
        _log.info("measured", rows=user.rows, ef_few=measured.ef_few, ef_many=measured.ef_many)
