"""Connecting to PostgreSQL: types, and a first connection that fails with a message that says what to do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import asyncpg

from common.dsn import location

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
else:
    Connection: TypeAlias = asyncpg.Connection
    Pool: TypeAlias = asyncpg.Pool

CONNECT_TIMEOUT_S = 5.0

# The connection, or the server behind it, went away. asyncpg says so in several ways, depending on where its protocol
# stood at that moment; InternalClientError, its word for a bug of its own, is one of them. OSError covers refused and
# reset connections. One of the last kind is none, and is to be caught before: QueryCanceledError, a statement that the
# server has ended by itself.
CONNECTION_LOST = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
)

# The server answers, and cannot do it now: out of some resource, an I/O error, a primary that has become read-only, a
# lock that was not had in time, a deadlock. None of them leaves an effect.
CANNOT_NOW = (
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresIOError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
)

# What a connection attempt raises when the server is not there, not ready, or says no.
CONNECT_ERRORS = (*CONNECTION_LOST, TimeoutError, asyncpg.PostgresError)


# Settings by which a server finds out within 15 s that the machine of its client was lost without a word. By itself it
# would take two hours, and whatever the session holds would be held for as long.
NOTICE_LOSS: Final[Mapping[str, str]] = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "3",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "15s",
}


class DatabaseUnreachableError(Exception):
    """A database did not let us in; the message names it (without its password) and the cause."""


async def connect(
    dsn: str, *, what: str, database: str | None = None, settings: Mapping[str, str] | None = None
) -> "asyncpg.Connection[asyncpg.Record]":
    """One connection to the database that `what` names for people ("the catalog"); `database`: another of its server.
    `settings` are the server's, for this session.

    Raises DatabaseUnreachableError.
    """
    try:
        return await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, database=database, server_settings=dict(settings or {})
        )
    except CONNECT_ERRORS as error:
        raise DatabaseUnreachableError(f"{what} at {location(dsn)} cannot be reached: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """What went wrong when connecting, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no answer in {CONNECT_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__
