"""The pool of connections to the shard's own database, and what its failures mean to a caller."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
from pgvector.asyncpg import register_vector

from common.config import ShardSettings
from common.deadline import Deadline
from common.errors import OutcomeUnknown, Unavailable
from common.postgres import CONNECT_TIMEOUT_S, CONNECTION_LOST, Connection, Pool

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

# Seconds after which a caller may try again: a primary that was killed is back in about one.
_RETRY_AFTER_S = 1.0


class Database:
    """Connections to the shard's database, with the two kinds of use that fail differently: reads and writes."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def reading(self, deadline: Deadline) -> AsyncIterator[Connection]:
        """A connection for a read. A lost one is Unavailable: nothing happened, any retry is safe."""
        connection = await self._acquire(deadline)
        try:
            yield connection
        except CONNECTION_LOST as error:
            raise _unavailable() from error
        finally:
            await self._release(connection)

    @asynccontextmanager
    async def writing(self, deadline: Deadline) -> AsyncIterator[Connection]:
        """A connection for a write that commits by itself. One lost meanwhile is OutcomeUnknown."""
        connection = await self._acquire(deadline)
        try:
            yield connection
        except CONNECTION_LOST as error:
            raise OutcomeUnknown(
                "the database went away during the write; the same request again settles whether it happened",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        finally:
            await self._release(connection)

    async def _acquire(self, deadline: Deadline) -> "PoolConnectionProxy[asyncpg.Record]":
        try:
            return await self._pool.acquire(timeout=deadline.remaining_s())
        except CONNECTION_LOST as error:
            raise _unavailable() from error

    async def _release(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        # A connection that died cannot be tidied up. The pool replaces it, and its complaint must not take the place
        # of the error that the caller is about to see.
        with suppress(*CONNECTION_LOST):
            await self._pool.release(connection)


async def open_pool(settings: ShardSettings) -> Pool:
    """The pool that serves requests, as the role that can only read and write rows."""
    return await asyncpg.create_pool(
        settings.database_dsn.get_secret_value(),
        min_size=settings.pool_min_connections,
        max_size=settings.pool_max_connections,
        init=_prepare,
        reset=_keep,
        timeout=CONNECT_TIMEOUT_S,
        server_settings={"application_name": f"memshard {settings.shard_id}"},
    )


async def close_pool(pool: Pool) -> None:
    """Closes the pool politely, or not at all politely when the database does not answer."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


async def is_writable(database: Database) -> bool:
    """Whether the database answers and is a primary, within two seconds."""
    deadline = Deadline.after(2.0)
    try:
        async with deadline.bound(), database.reading(deadline) as connection:
            return not await connection.fetchval("SELECT pg_is_in_recovery()")
    except (Unavailable, TimeoutError, asyncpg.PostgresError):
        return False


async def _prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    await register_vector(connection)


async def _keep(connection: Connection) -> None:
    """Instead of asyncpg's reset, which costs a round trip: no statement here changes a session's state."""


def _unavailable() -> Unavailable:
    return Unavailable(
        "the shard's database does not answer", reason="DATABASE_UNAVAILABLE", retry_after_s=_RETRY_AFTER_S
    )
