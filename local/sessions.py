"""Connections of the supervisor's own to a PostgreSQL server, with a bound on what is done in them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from common.catalog import CatalogError
from common.migrations import NewerSchemaError
from common.postgres import CONNECT_ERRORS, CONNECT_TIMEOUT_S, explain
from common.roles import OWNER
from local.errors import LocalClusterError
from local.postgres import SUPERUSER, Server
from local.record import Secrets

if TYPE_CHECKING:
    from common.postgres import Connection

# What the supervisor writes (roles, grants) must not wait for a standby that it may yet have to make.
_SETTINGS = {"application_name": "memshard supervisor", "synchronous_commit": "local"}


@asynccontextmanager
async def session(
    role: str, password: str, server: Server, *, database: str | None = None, within_s: float | None = None
) -> "AsyncIterator[Connection]":
    """A connection to a server as `role`, for at most `within_s`. Raises LocalClusterError, with no password in it."""
    try:
        async with asyncio.timeout(within_s):
            connection = await asyncpg.connect(
                server.dsn(role, password, database), timeout=CONNECT_TIMEOUT_S, server_settings=_SETTINGS
            )
            try:
                yield connection
                await connection.close()
            finally:
                connection.terminate()
    except (CatalogError, NewerSchemaError) as error:
        raise LocalClusterError(str(error)) from error
    except CONNECT_ERRORS as error:
        raise LocalClusterError(f"{server.name}: {explain(error)}") from error


def as_superuser(server: Server, secrets: Secrets, within_s: float) -> "AbstractAsyncContextManager[Connection]":
    """A connection to the maintenance database of a server, to look after it. Raises LocalClusterError."""
    return session(SUPERUSER, secrets.postgres, server, database="postgres", within_s=within_s)


def as_owner(
    server: Server, secrets: Secrets, within_s: float | None = None
) -> "AbstractAsyncContextManager[Connection]":
    """A connection to a server's database as its owner. Raises LocalClusterError."""
    return session(OWNER, secrets.memshard_owner, server, within_s=within_s)
