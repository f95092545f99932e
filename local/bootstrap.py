"""Making a cluster: data directories, roles, databases, the catalog. And telling the catalog of changed addresses.

A cluster that was not made to its end holds nothing that anybody stored, so it is thrown away and made anew.
"""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from common import catalog, roles
from common.catalog import EpochConflictError, Precision
from common.provision import tell_addresses
from common.roles import APP, MOVER, OWNER, REPLICATION, Login
from common.sync_set import SyncSet
from common.topology import Shard, Topology
from local.account import Account
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout
from local.postgres import SUPERUSER, Server, initialise
from local.record import Record, Secrets
from local.sessions import as_owner, session

_ADDRESS_TRIES = 5


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
            await roles.ensure_login(connection, Login(role, password))
        await roles.ensure_database(connection, server.database, OWNER)
    async with session(SUPERUSER, secrets.postgres, server) as connection:
        await roles.close_database(connection)
        if vector:
            await roles.ensure_vector(connection)


async def complete_shard_server(server: Server, secrets: Secrets) -> None:
    """Gives a shard's primary the roles and grants that it lacks: all that came after it was first made."""
    async with session(SUPERUSER, secrets.postgres, server) as connection:
        await roles.ensure_login(connection, Login(REPLICATION, secrets.memshard_replication), replication=True)
        await roles.ensure_login(connection, Login(MOVER, secrets.memshard_mover), replication=True)
        await roles.let_keep_standbys(connection)
        await roles.let_move_slots(connection)


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
        await roles.let_read(connection)


async def make_mover(server: Server, secrets: Secrets) -> None:
    """Makes the mover's role on the catalog's server, if it is not there."""
    async with session(SUPERUSER, secrets.postgres, server) as connection:
        await roles.ensure_login(connection, Login(MOVER, secrets.memshard_mover))


async def tell_catalog(server: Server, secrets: Secrets, record: Record, shards: Sequence[Shard]) -> Topology:
    """Brings the catalog up to date, tells it where shards and replicas are now if that is news; the topology."""
    await make_mover(server, secrets)
    async with as_owner(server, secrets) as connection:
        await catalog.upgrade(connection)
        await roles.let_keep_sync_sets(connection)
        await roles.let_set_levels(connection)
        await roles.let_keep_moves(connection)
        for shard in shards:
            # The first server is the primary of a new shard; of one that has a set already nothing changes.
            first = SyncSet(record.server_names(shard.shard_id)[0], frozenset())
            await catalog.create_sync_set(connection, shard.shard_id, first)
        for _ in range(_ADDRESS_TRIES):
            topology = await catalog.read_topology(connection)
            try:
                if not await tell_addresses(connection, topology, shards):
                    return topology
            except EpochConflictError:
                continue
    raise LocalClusterError("the catalog keeps changing; the shards' new addresses could not be written to it")
