"""Who this shard is: settled when it first starts, from the catalog, and checked whenever it starts again.

The shard's own database is the authority on what it owns; the catalog is asked for its first slots only. A shard that
asked again after a move would take back slots that it has given away.
"""

import json
from dataclasses import dataclass

import asyncpg
from pydantic import SecretStr

from common import catalog, logs, migrations, postgres
from common.config import ShardSettings
from common.dsn import location
from common.lifecycle import StartError
from common.postgres import CONNECT_ERRORS, Connection, explain
from shard import schema
from shard.primary import Primary, PrimaryConnection

_log = logs.get_logger("identity")


@dataclass(frozen=True, slots=True)
class Identity:
    """The shard's place in its cluster. `dimensions` is the length of every embedding."""

    cluster_id: str
    shard_id: str
    embedding_model: str
    dimensions: int
    precision: catalog.Precision
    placement: catalog.PlacementStrategy
    text_language: str

    @property
    def vector_type(self) -> str:
        """pgvector's name for embeddings of this precision."""
        return schema.VECTOR_TYPE[self.precision]


# As JSON, because it is read before the schema is brought up to date: an older one lacks the newer columns.
_READ_IDENTITY = "SELECT to_jsonb(identity)::text FROM identity"
_CREATE_IDENTITY = """
INSERT INTO identity (cluster_id, shard_id, embedding_model, dimensions, precision, placement, text_language, epoch)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""
_HAS_LANGUAGE = "SELECT EXISTS (SELECT FROM pg_ts_config WHERE cfgname = $1)"
_CREATE_OWNED = "INSERT INTO owned_slots (slot, state) SELECT generate_series($1::int, $2::int), 'own'"
_READ_EPOCH = "SELECT epoch FROM identity"
# Made into ranges by the server: routers ask often, and thousands of rows would keep the service from everything else.
_READ_OWNED = """
SELECT min(slot) AS first, max(slot) AS last
FROM (SELECT slot, slot - row_number() OVER (ORDER BY slot) AS gaps FROM owned_slots WHERE state IN ('own', 'fenced'))
     AS owned
GROUP BY gaps ORDER BY first
"""
# format's %I quotes the role's name; the statements are made by the server from a parameter. Who owns which slot, and
# what the schema is, the serving role can only read.
_GRANTS = """
SELECT format('GRANT SELECT ON identity, owned_slots, departures, own_indexes TO %1$I;
               GRANT UPDATE (held) ON owned_slots TO %1$I;
               GRANT SELECT, INSERT, UPDATE, DELETE
               ON memories, memory_versions, applied_requests, request_claims, claims, erasures, erased_ids TO %1$I;
               GRANT SELECT, INSERT, UPDATE ON heartbeats TO %1$I', $1::text)
"""
# A start waits this long for another one that changes the schema.
_MIGRATION_LOCK_TIMEOUT = "SET lock_timeout = '30s'"
_HAS_IDENTITY = "SELECT to_regclass('public.identity') IS NOT NULL"


async def settle(settings: ShardSettings, owner: Primary, serving: Primary) -> Identity:
    """Brings the schema up to date, and makes this database the shard's if it is new.

    `owner` and `serving` connect as the two roles. Waits for a server that takes writes, for a bounded time.
    Raises StartError: database or catalog out of reach when needed, or this is another shard's database.
    """
    connection = await _connect(owner, settings.migration_dsn or settings.database_dsn, settings.primary_wait_s)
    try:
        await connection.execute(_MIGRATION_LOCK_TIMEOUT)
        known = await read(connection)
        if known is None:
            known = await _join(connection, settings)
        else:
            await _migrate(connection, known)
        await _grant(connection, settings, serving)
    except migrations.NewerSchemaError as error:
        raise StartError(str(error)) from error
    except asyncpg.PostgresError as error:
        raise StartError(
            f"the shard's database cannot be made ready: {error}. Check that the extension vector exists in it, that "
            "the role of migration_dsn owns it, and that no other start of this shard is under way"
        ) from error
    finally:
        await connection.close()
    if known.shard_id != settings.shard_id:
        raise StartError(
            f"this database belongs to {known.shard_id}, not to {settings.shard_id}: check shard_id and database_dsn"
        )
    await _compare_with_catalog(settings, known)
    return known


async def read(connection: Connection) -> Identity | None:
    """Who the database says that it is; None when it has not been told yet."""
    if not await connection.fetchval(_HAS_IDENTITY):
        return None
    document = await connection.fetchval(_READ_IDENTITY)
    if document is None:
        return None
    row = json.loads(document)
    return Identity(
        cluster_id=row["cluster_id"],
        shard_id=row["shard_id"],
        embedding_model=row["embedding_model"],
        dimensions=row["dimensions"],
        precision=catalog.Precision(row["precision"]),
        placement=catalog.PlacementStrategy(row.get("placement", catalog.PlacementStrategy.USER_BASED)),
        text_language=row.get("text_language", catalog.DEFAULT_TEXT_LANGUAGE),
    )


async def read_epoch(connection: Connection) -> int:
    """The newest epoch that this shard knows of."""
    epoch: int = await connection.fetchval(_READ_EPOCH)
    return epoch


async def read_owned(connection: Connection) -> list[tuple[int, int]]:
    """The slots that this shard serves, as (first, last) ranges."""
    return [(row["first"], row["last"]) for row in await connection.fetch(_READ_OWNED)]


async def _migrate(connection: Connection, known: Identity) -> None:
    if not await connection.fetchval(_HAS_LANGUAGE, known.text_language):
        raise StartError(f"this PostgreSQL has no text search configuration {known.text_language}")
    for number in await migrations.migrate(connection, schema.migrations(known)):
        _log.info("schema changed", number=number)


async def _join(connection: Connection, settings: ShardSettings) -> Identity:
    """A new database: its tables, and the slots that the catalog gives this shard, all or nothing."""
    try:
        catalog_connection = await postgres.connect(settings.catalog_dsn.get_secret_value(), what="the catalog")
        try:
            cluster = await catalog.read_cluster(catalog_connection)
            topology = await catalog.read_topology(catalog_connection)
        finally:
            await catalog_connection.close()
    except (postgres.DatabaseUnreachableError, catalog.CatalogError) as error:
        raise StartError(f"a new shard needs the catalog: {error}") from error
    if settings.shard_id not in {shard.shard_id for shard in topology.shards}:
        raise StartError(f"the catalog knows no shard {settings.shard_id}: check shard_id and catalog_dsn")
    identity = Identity(
        cluster_id=cluster.cluster_id,
        shard_id=settings.shard_id,
        embedding_model=cluster.embedding_model,
        dimensions=cluster.dimensions,
        precision=cluster.precision,
        placement=cluster.placement,
        text_language=cluster.text_language,
    )
    await _migrate(connection, identity)
    async with connection.transaction():
        await connection.execute(
            _CREATE_IDENTITY,
            identity.cluster_id,
            identity.shard_id,
            identity.embedding_model,
            identity.dimensions,
            identity.precision.value,
            identity.placement.value,
            identity.text_language,
            topology.epoch,
        )
        for owned in topology.ranges:
            if owned.shard_id == settings.shard_id:
                await connection.execute(_CREATE_OWNED, owned.first, owned.last)
    _log.info("joined", cluster_id=identity.cluster_id, epoch=topology.epoch)
    return identity


async def _connect(primary: Primary, dsn: SecretStr, timeout_s: float) -> PrimaryConnection:
    try:
        await primary.find(timeout_s)
        return await primary.connect()
    except CONNECT_ERRORS as error:
        raise StartError(
            f"the shard's database at {location(dsn.get_secret_value())} cannot be reached: {explain(error)}. "
            "Check database_dsn and migration_dsn"
        ) from error


async def _grant(connection: Connection, settings: ShardSettings, serving: Primary) -> None:
    """Lets the serving role, when it is another than the owner, at the rows of the tables and at nothing else."""
    if settings.migration_dsn in (None, settings.database_dsn):
        return
    other = await _connect(serving, settings.database_dsn, settings.primary_wait_s)
    try:
        role = await other.fetchval("SELECT current_user")
    finally:
        await other.close()
    await connection.execute(await connection.fetchval(_GRANTS, role))


async def _compare_with_catalog(settings: ShardSettings, known: Identity) -> None:
    """Refuses to serve under a catalog of another cluster; a catalog that is down is no reason not to start."""
    try:
        connection = await postgres.connect(settings.catalog_dsn.get_secret_value(), what="the catalog")
    except postgres.DatabaseUnreachableError as error:
        _log.warning("the catalog is out of reach; serving what this shard owns", why=str(error))
        return
    try:
        cluster = await catalog.read_cluster(connection)
    except (catalog.CatalogError, asyncpg.PostgresError) as error:
        raise StartError(f"the catalog cannot be used: {error}") from error
    finally:
        await connection.close()
    if cluster.cluster_id != known.cluster_id:
        raise StartError(
            f"this database belongs to cluster {known.cluster_id}, and catalog_dsn to {cluster.cluster_id}: "
            "check database_dsn and catalog_dsn"
        )
    if (cluster.embedding_model, cluster.dimensions) != (known.embedding_model, known.dimensions):
        raise StartError(
            f"this database holds embeddings of {known.embedding_model!r} with {known.dimensions} dimensions, and the "
            f"catalog says {cluster.embedding_model!r} with {cluster.dimensions}. They are fixed when a cluster is "
            "made: restore the catalog, or make a new cluster and import into it"
        )
