"""Making a cluster: data directories, roles, databases, the catalog. And telling the catalog of changed addresses.

A cluster that was not made to its end holds nothing that anybody stored, so it is thrown away and made anew.
"""

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from common import catalog
from common.catalog import CatalogError, EpochConflictError, Precision
from common.migrations import NewerSchemaError
from common.postgres import CONNECT_ERRORS, DatabaseUnreachableError, connect
from common.topology import Shard, Topology
from local.account import Account
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout
from local.postgres import APP, OWNER, SUPERUSER, Server, initialise
from local.record import Record, Secrets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.postgres import Connection

_ADDRESS_TRIES = 5

# These statements take no parameters, so the server makes them from parameters, quoting names (%I) and values (%L).
_CREATE_ROLE = "SELECT format('CREATE ROLE %I LOGIN PASSWORD %L', $1::text, $2::text)"
_CREATE_DATABASE = "SELECT format('CREATE DATABASE %I OWNER %I', $1::text, $2::text)"
# The owner of the database may create in `public` (pg_database_owner); nobody else may, in any PostgreSQL.
_CLOSE_SCHEMA = "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
# The roles of the services have no business in the maintenance database, nor with temporary tables.
_CLOSE_DATABASES = """
SELECT format('REVOKE ALL ON DATABASE postgres FROM PUBLIC; REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', $1::text)
"""
_ADD_VECTOR = "CREATE EXTENSION vector"
_READ_ONLY = f"""
GRANT SELECT ON ALL TABLES IN SCHEMA public TO {APP};
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {APP};
"""


def discard_unfinished(layout: Layout) -> None:
    """Removes what an `up` left that was killed while it made the cluster."""
    for directory in (layout.postgres, layout.config, layout.redis, layout.run):
        if directory.exists():
            shutil.rmtree(directory)
    for file in (layout.secrets, layout.state):
        file.unlink(missing_ok=True)


async def make_data_directories(
    servers: Sequence[Server], binaries: Path, account: Account | None, secrets: Secrets
) -> None:
    """Makes the data directory of each PostgreSQL server, all at once. Raises LocalClusterError."""
    try:
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(initialise(server, binaries, account, secrets.postgres))
    except* LocalClusterError as failures:
        raise failures.exceptions[0] from failures
    except* OSError as failures:
        raise DataDirectoryError(f"the databases cannot be made: {failures.exceptions[0]}") from failures


def require_data_directories(servers: Sequence[Server]) -> None:
    """Raises DataDirectoryError when one of a finished cluster is missing: it must not be made again, empty."""
    for server in servers:
        if not (server.pgdata / "PG_VERSION").exists():
            raise DataDirectoryError(
                f"{server.pgdata} is missing, and with it the data of {server.name}: restore it, "
                "or make a new cluster with another --data-dir"
            )


async def make_database(server: Server, secrets: Secrets, *, vector: bool) -> None:
    """Makes the roles and the database of a new server, with pgvector if wanted."""
    async with _as(SUPERUSER, secrets.postgres, server, database="postgres") as connection:
        for role, password in ((OWNER, secrets.memshard_owner), (APP, secrets.memshard_app)):
            await connection.execute(await connection.fetchval(_CREATE_ROLE, role, password))
        await connection.execute(await connection.fetchval(_CREATE_DATABASE, server.database, OWNER))
    async with _as(SUPERUSER, secrets.postgres, server) as connection:
        await connection.execute(_CLOSE_SCHEMA)
        await connection.execute(await connection.fetchval(_CLOSE_DATABASES, server.database))
        if vector:
            await connection.execute(_ADD_VECTOR)


async def make_catalog(server: Server, secrets: Secrets, record: Record, addresses: Mapping[str, str]) -> Topology:
    """Makes the catalog in its new database. `addresses` are the shards', by id."""
    shards = [Shard(shard_id, address, record.weight_of(shard_id)) for shard_id, address in addresses.items()]
    async with _as(OWNER, secrets.memshard_owner, server) as connection:
        await catalog.create(
            connection,
            shards,
            embedding_model=record.embedder_model,
            dimensions=record.dimensions,
            precision=Precision(record.precision),
            placement=record.placement,
            text_language=record.text_language,
        )
        await connection.execute(_READ_ONLY)
        return await catalog.read_topology(connection)


async def tell_addresses(server: Server, secrets: Secrets, addresses: Mapping[str, str]) -> Topology:
    """Brings the catalog up to date, tells it where the shards are now if that is news, and returns the topology."""
    async with _as(OWNER, secrets.memshard_owner, server) as connection:
        await catalog.upgrade(connection)
        for _ in range(_ADDRESS_TRIES):
            topology = await catalog.read_topology(connection)
            known = {shard.shard_id: shard.address for shard in topology.shards}
            changed = {
                shard_id: address for shard_id, address in addresses.items() if known.get(shard_id, address) != address
            }
            if not changed:
                return topology
            try:
                await catalog.set_addresses(connection, topology.epoch, changed)
            except EpochConflictError:
                continue
    raise LocalClusterError("the catalog keeps changing; the shards' new addresses could not be written to it")


@asynccontextmanager
async def _as(role: str, password: str, server: Server, database: str | None = None) -> "AsyncIterator[Connection]":
    """A connection to a server as `role`. Raises LocalClusterError, without any password in it."""
    try:
        connection = await connect(server.dsn(role, password, database), what=server.name)
        try:
            yield connection
        finally:
            await connection.close()
    except (DatabaseUnreachableError, CatalogError, NewerSchemaError) as error:
        raise LocalClusterError(str(error)) from error
    except asyncpg.PostgresError as error:
        raise LocalClusterError(f"{server.name}: {error}") from error
    except CONNECT_ERRORS as error:
        raise LocalClusterError(f"{server.name} was lost: {error}") from error
