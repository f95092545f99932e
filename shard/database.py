"""The pool of connections to the shard's own database, and what its failures mean to a caller."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
from pgvector.asyncpg import register_vector

from common.config import ReplicaSettings, ShardSettings
from common.deadline import Deadline
from common.errors import InvalidArgument, OutcomeUnknown, Unavailable
from common.postgres import CANNOT_NOW, CONNECT_ERRORS, CONNECT_TIMEOUT_S, CONNECTION_LOST, Connection, Pool

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

# Seconds after which a caller may try again: a primary that was killed is back in about one.
_RETRY_AFTER_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_STATEMENT_TIMEOUT_S = 30


class Database:
    """Connections to the shard's database, with the two kinds of use that fail differently: reads and writes.

    Writes may not take all connections: one that waits for a fence, its caller long gone, must not keep readers out.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._writes = asyncio.Semaphore(max(1, pool.get_max_size() * 3 // 4))

    @asynccontextmanager
    async def reading(self, deadline: Deadline) -> AsyncIterator[Connection]:
        """A connection for a read, or work that may be done again. A lost one is Unavailable: any retry is safe."""
        connection = await self._acquire(deadline)
        try:
            with _explained():
                yield connection
        except CONNECTION_LOST as error:
            raise _unavailable() from error
        finally:
            await self._release(connection)

    async def to_write(self, deadline: Deadline) -> "WriteConnection":
        """A connection for one write. Whoever gets it must enter it, which gives it back at the end.

        Raises Unavailable, TimeoutError.
        """
        async with deadline.bound():
            await self._writes.acquire()
        try:
            connection = await self._acquire(deadline)
        except BaseException:
            self._writes.release()
            raise
        return WriteConnection(connection, self._give_back)

    async def _give_back(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        try:
            await self._release(connection)
        finally:
            self._writes.release()

    async def _acquire(self, deadline: Deadline) -> "PoolConnectionProxy[asyncpg.Record]":
        try:
            return await self._pool.acquire(timeout=deadline.remaining_s())
        except (*CONNECTION_LOST, *CANNOT_NOW) as error:
            raise _unavailable() from error

    async def _release(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        # A connection that died cannot be tidied up. The pool replaces it, and its complaint must not take the place
        # of the error that the caller is about to see.
        with suppress(*CONNECTION_LOST):
            await self._pool.release(connection)


class WriteConnection:
    """`async with` it: a write that commits by itself. A connection lost meanwhile is OutcomeUnknown."""

    def __init__(
        self,
        connection: "PoolConnectionProxy[asyncpg.Record]",
        give_back: "Callable[[PoolConnectionProxy[asyncpg.Record]], Awaitable[None]]",
    ) -> None:
        self._connection = connection
        self._give_back = give_back

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[Connection]:
        """The connection, given back at the end."""
        try:
            with _explained():
                yield self._connection
        except CONNECTION_LOST as error:
            raise OutcomeUnknown(
                "the database went away during the write; the same request again settles whether it happened",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        finally:
            await self._give_back(self._connection)


async def open_pool(settings: ShardSettings | ReplicaSettings, application_name: str) -> Pool:
    """The pool that serves requests, as the role that can only read and write rows."""
    lock_timeout_s = settings.lock_timeout_s if isinstance(settings, ShardSettings) else _STATEMENT_TIMEOUT_S
    return await asyncpg.create_pool(
        settings.database_dsn.get_secret_value(),
        min_size=settings.pool_min_connections,
        max_size=settings.pool_max_connections,
        init=_prepare,
        reset=_keep,
        timeout=CONNECT_TIMEOUT_S,
        server_settings={
            "application_name": application_name,
            # What receipts promise, and what the statements rely on, whatever the database's own defaults are.
            "synchronous_commit": "on",
            "default_transaction_isolation": "read committed",
            # A write that waits for a fence gives up before its commit begins, and may be sent again.
            "lock_timeout": f"{lock_timeout_s:.3f}s",
            # No statement here takes a second. One that does not end must not keep its connection for ever.
            "statement_timeout": f"{_STATEMENT_TIMEOUT_S}s",
        },
    )


async def close_pool(pool: Pool) -> None:
    """Closes the pool politely, or not at all politely when the database does not answer."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


class Probe:
    """Whether the database can be written to, asked on a connection of its own: a busy pool is no bad health."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def is_writable(self) -> bool:
        """Whether the database answers within two seconds, and is a primary."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                if self._connection is None:
                    self._connection = await asyncpg.connect(self._dsn)
                return not await self._connection.fetchval("SELECT pg_is_in_recovery()")
        except CONNECT_ERRORS:
            self.close()
            return False

    def close(self) -> None:
        """Drops the connection."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


async def _prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    await register_vector(connection)


async def _keep(connection: Connection) -> None:
    """Instead of asyncpg's reset, which costs a round trip: no statement here changes a session's state."""


@contextmanager
def _explained() -> Iterator[None]:
    """What the server itself says of a statement that it did not carry out, in domain errors."""
    try:
        yield
    except asyncpg.LockNotAvailableError as error:
        raise Unavailable(
            "the memory's slot is held by something else at the moment",
            reason="SLOT_BUSY",
            retry_after_s=_RETRY_AFTER_S,
        ) from error
    except CANNOT_NOW as error:
        raise _unavailable() from error
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
        # Routers check what comes from agents; this is what came past them.
        raise InvalidArgument("a value in the request does not fit the database", reason="BAD_VALUE") from error


def _unavailable() -> Unavailable:
    return Unavailable(
        "the shard's database does not answer", reason="DATABASE_UNAVAILABLE", retry_after_s=_RETRY_AFTER_S
    )
