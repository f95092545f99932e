"""Making a cluster: data directories, roles, databases, the catalog. And telling the catalog of changed addresses.

A cluster that was not made to its end holds nothing that anybody stored, so it is thrown away and made anew.
"""

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import catalog
from common.catalog import EpochConflictError, Precision
from common.postgres import Connection
from common.sync_set import SyncSet
from common.topology import Replica, Shard, Topology
from local.account import Account
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout
from local.postgres import APP, MOVER, OWNER, REPLICATION, SUPERUSER, Server, initialise
from local.record import Record, Secrets
from local.sessions import as_owner, session

_ADDRESS_TRIES = 5

# These statements take no parameters, so the server makes them from parameters, quoting names (%I) and values (%L).
_CREATE_ROLE = "SELECT format('CREATE ROLE %I LOGIN PASSWORD %L', $1::text, $2::text)"
_CREATE_REPLICATION_ROLE = "SELECT format('CREATE ROLE %I LOGIN REPLICATION PASSWORD %L', $1::text, $2::text)"
_HAS_ROLE = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)"
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
# A shard's service keeps its sync set, and does no more to the catalog: who the primary is, whoever promotes records.
_KEEP_SYNC_SETS = f"""
REVOKE UPDATE ON sync_sets FROM {APP};
GRANT SELECT, UPDATE (members, following, version) ON sync_sets TO {APP};
"""
# What a shard's service needs to keep the standbys that its commits wait for: to see them, and to set them.
_KEEP_STANDBYS = f"""
GRANT pg_monitor TO {APP}, {OWNER};
GRANT ALTER SYSTEM ON PARAMETER synchronous_standby_names TO {OWNER};
GRANT EXECUTE ON FUNCTION pg_reload_conf() TO {OWNER};
"""
# What moving slots takes: publications are made by whoever owns the tables, and rows are applied as the owner; slots
# for replication, and subscriptions.
_MOVE_SLOTS = f"""
GRANT {OWNER}, pg_create_subscription, pg_monitor TO {MOVER};
GRANT EXECUTE ON FUNCTION pg_log_standby_snapshot() TO {MOVER};
"""
# The mover changes who has which slots, and which shards there are. What was fixed when the cluster was made, and who
# takes a shard's writes, it reads.
_KEEP_MOVES = f"""
GRANT SELECT ON ALL TABLES IN SCHEMA public TO {MOVER};
GRANT UPDATE ON topology TO {MOVER};
GRANT INSERT, UPDATE, DELETE ON moves, cutovers, pins, slot_ranges, shards, replicas TO {MOVER};
GRANT DELETE ON sync_sets, levels TO {MOVER};
"""


def discard_unfinished(layout: Layout) -> None:
    """Removes what an `up` left that was killed while it made the cluster."""
    for directory in (layout.postgres, layout.config, layout.redis, layout.run):
        if directory.exists():
            shutil.rmtree(directory)
    for file in (layout.secrets, layout.state, layout.admin_token):
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
    async with session(SUPERUSER, secrets.postgres, server, database="postgres") as connection:
        for role, password in ((OWNER, secrets.memshard_owner), (APP, secrets.memshard_app)):
            await connection.execute(await connection.fetchval(_CREATE_ROLE, role, password))
        await connection.execute(await connection.fetchval(_CREATE_DATABASE, server.database, OWNER))
    async with session(SUPERUSER, secrets.postgres, server) as connection:
        await connection.execute(_CLOSE_SCHEMA)
        await connection.execute(await connection.fetchval(_CLOSE_DATABASES, server.database))
        if vector:
            await connection.execute(_ADD_VECTOR)


async def complete_shard_server(server: Server, secrets: Secrets) -> None:
    """Gives a shard's primary the roles and grants that it lacks: all that came after it was first made."""
    async with session(SUPERUSER, secrets.postgres, server) as connection:
        if not await connection.fetchval(_HAS_ROLE, REPLICATION):
            statement = await connection.fetchval(_CREATE_REPLICATION_ROLE, REPLICATION, secrets.memshard_replication)
            await connection.execute(statement)
        if not await connection.fetchval(_HAS_ROLE, MOVER):
            statement = await connection.fetchval(_CREATE_REPLICATION_ROLE, MOVER, secrets.memshard_mover)
            await connection.execute(statement)
        await connection.execute(_KEEP_STANDBYS)
        await connection.execute(_MOVE_SLOTS)


async def make_catalog(server: Server, secrets: Secrets, record: Record, shards: Sequence[Shard]) -> None:
    """Makes the catalog in its new database."""
    async with as_owner(server, secrets) as connection:
        await catalog.create(
            connection,
            shards,
            embedding_model=record.embedder_model,
            dimensions=record.dimensions,
            precision=Precision(record.precision),
            placement=record.placement,
            text_language=record.text_language,
        )
        await grant_reading(connection)


async def grant_reading(connection: Connection) -> None:
    """Lets the services' role read a new catalog."""
    await connection.execute(_READ_ONLY)


async def make_mover(server: Server, secrets: Secrets) -> None:
    """Makes the mover's role on the catalog's server, if it is not there."""
    async with session(SUPERUSER, secrets.postgres, server) as connection:
        if not await connection.fetchval(_HAS_ROLE, MOVER):
            await connection.execute(await connection.fetchval(_CREATE_ROLE, MOVER, secrets.memshard_mover))


async def tell_catalog(server: Server, secrets: Secrets, record: Record, shards: Sequence[Shard]) -> Topology:
    """Brings the catalog up to date, tells it where shards and replicas are now if that is news; the topology."""
    await make_mover(server, secrets)
    async with as_owner(server, secrets) as connection:
        await catalog.upgrade(connection)
        await connection.execute(_KEEP_SYNC_SETS)
        await connection.execute(_KEEP_MOVES)
        for shard in shards:
            # The first server is the primary of a new shard; of one that has a set already nothing changes.
            first = SyncSet(record.server_names(shard.shard_id)[0], frozenset())
            await catalog.create_sync_set(connection, shard.shard_id, first)
        for _ in range(_ADDRESS_TRIES):
            topology = await catalog.read_topology(connection)
            try:
                if not await _tell_changes(connection, topology, {shard.shard_id: shard for shard in shards}):
                    return topology
            except EpochConflictError:
                continue
    raise LocalClusterError("the catalog keeps changing; the shards' new addresses could not be written to it")


async def _tell_changes(connection: Connection, topology: Topology, shards: Mapping[str, Shard]) -> bool:
    """Whether there was something to tell. Raises EpochConflictError."""
    pairs = [(known, shards[known.shard_id]) for known in topology.shards if known.shard_id in shards]
    addresses = {now.shard_id: now.address for known, now in pairs if known.address != now.address}
    replicas: dict[str, Sequence[Replica]] = {
        now.shard_id: now.replicas for known, now in pairs if set(known.replicas) != set(now.replicas)
    }
    epoch = topology.epoch
    if addresses:
        epoch = await catalog.set_addresses(connection, epoch, addresses)
    if replicas:
        await catalog.set_replicas(connection, epoch, replicas)
    return bool(addresses or replicas)
