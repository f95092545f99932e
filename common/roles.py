"""The roles of a cluster's databases, and what each may do: the same wherever PostgreSQL runs.

Everything here may be done again: what is there already stays, but for a password, which becomes the one given. The
connection is a superuser's, and where a database is meant, one to that database.
"""

from dataclasses import dataclass, field

import asyncpg

from common.postgres import Connection

OWNER = "memshard_owner"
"""Owns the databases: changes their schema, and in the catalog the topology."""
APP = "memshard_app"
"""What the services serve as: reads the catalog, sets levels in it, reads and writes rows in a shard."""
REPLICATION = "memshard_replication"
"""What standbys stream as."""
MOVER = "memshard_mover"
"""What slots are moved as: changes the topology, and replicates between shards."""
CATALOG_DATABASE = "memshard_catalog"
SHARD_DATABASE = "memshard"

# These statements take no parameters, so the server makes them from parameters, quoting names (%I) and values (%L).
_CREATE_ROLE = "SELECT format('CREATE ROLE %I', $1::text)"
_ALTER_ROLE = "SELECT format('ALTER ROLE %I %s PASSWORD %L', $1::text, $2::text, $3::text)"
_HAS_ROLE = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)"
_CREATE_DATABASE = "SELECT format('CREATE DATABASE %I OWNER %I', $1::text, $2::text)"
_HAS_DATABASE = "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)"
# The owner of the database may create in `public` (pg_database_owner); nobody else may, in any PostgreSQL.
_CLOSE_SCHEMA = "REVOKE CREATE ON SCHEMA public FROM PUBLIC"
# The roles of the services have no business in the maintenance database, nor with temporary tables.
_CLOSE_DATABASES = """
SELECT format('REVOKE ALL ON DATABASE postgres FROM PUBLIC; REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC',
              current_database())
"""
_ADD_VECTOR = "CREATE EXTENSION IF NOT EXISTS vector"
_READ_ONLY = """
SELECT format('GRANT SELECT ON ALL TABLES IN SCHEMA public TO %1$I;
               ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO %1$I', $1::text)
"""
# A shard's service keeps its sync set, and does no more to the catalog: who the primary is, whoever promotes records.
_KEEP_SYNC_SETS = """
SELECT format('REVOKE UPDATE ON sync_sets FROM %1$I;
               GRANT SELECT, UPDATE (members, following, version) ON sync_sets TO %1$I', $1::text)
"""
# What a router's operators set through it; the function is all that a service may change of the topology.
_SET_LEVELS = "SELECT format('GRANT EXECUTE ON FUNCTION set_level(bigint, text, text) TO %I', $1::text)"
# What a shard's service needs to keep the standbys that its commits wait for: to see them, and to set them.
_KEEP_STANDBYS = """
SELECT format('GRANT pg_monitor TO %1$I, %2$I;
               GRANT ALTER SYSTEM ON PARAMETER synchronous_standby_names TO %2$I;
               GRANT EXECUTE ON FUNCTION pg_reload_conf() TO %2$I', $1::text, $2::text)
"""
# What moving slots takes: publications are made by whoever owns the tables, and rows are applied as the owner; slots
# for replication, and subscriptions.
_MOVE_SLOTS = """
SELECT format('GRANT %2$I, pg_create_subscription, pg_monitor TO %1$I;
               GRANT EXECUTE ON FUNCTION pg_log_standby_snapshot() TO %1$I', $1::text, $2::text)
"""
# The mover changes who has which slots, and which shards there are. What was fixed when the cluster was made, and who
# takes a shard's writes, it reads.
_KEEP_MOVES = """
SELECT format('GRANT SELECT ON ALL TABLES IN SCHEMA public TO %1$I;
               GRANT UPDATE ON topology TO %1$I;
               GRANT INSERT, UPDATE, DELETE ON moves, cutovers, pins, slot_ranges, shards, replicas TO %1$I;
               GRANT DELETE ON sync_sets, levels TO %1$I', $1::text)
"""


@dataclass(frozen=True, slots=True)
class Login:
    """A role and its password."""

    role: str
    password: str = field(repr=False)


async def has_role(connection: Connection, role: str) -> bool:
    """Whether there is such a role."""
    found: bool = await connection.fetchval(_HAS_ROLE, role)
    return found


async def ensure_login(connection: Connection, login: Login, *, replication: bool = False) -> None:
    """A role that may log in with this password; `replication`: and stream. On any database of the server."""
    if not await has_role(connection, login.role):
        await connection.execute(await connection.fetchval(_CREATE_ROLE, login.role))
    attributes = "LOGIN REPLICATION" if replication else "LOGIN"
    await connection.execute(await connection.fetchval(_ALTER_ROLE, login.role, attributes, login.password))


async def ensure_database(connection: Connection, name: str, owner: str) -> None:
    """A database of this name; one that is made belongs to `owner`. On another database of the server."""
    if not await connection.fetchval(_HAS_DATABASE, name):
        try:
            await connection.execute(await connection.fetchval(_CREATE_DATABASE, name, owner))
        except asyncpg.DuplicateDatabaseError:
            return  # Somebody else was at it.


async def close_database(connection: Connection) -> None:
    """Takes from everybody what only the owner needs. On the database meant."""
    await connection.execute(_CLOSE_SCHEMA)
    await connection.execute(await connection.fetchval(_CLOSE_DATABASES))


async def ensure_vector(connection: Connection) -> None:
    """pgvector, which only a superuser may add. On a shard's database."""
    await connection.execute(_ADD_VECTOR)


async def let_keep_standbys(connection: Connection, app: str = APP, owner: str = OWNER) -> None:
    """Lets a shard's service see its standbys, and set which its commits wait for. On the shard's database: each
    database has its own rights to pg_reload_conf()."""
    await connection.execute(await connection.fetchval(_KEEP_STANDBYS, app, owner))


async def let_move_slots(connection: Connection, mover: str = MOVER, owner: str = OWNER) -> None:
    """Lets the mover publish and subscribe to what `owner` owns. On the shard's database."""
    await connection.execute(await connection.fetchval(_MOVE_SLOTS, mover, owner))


async def let_keep_moves(connection: Connection, mover: str = MOVER) -> None:
    """Lets the mover change the topology, and keep what it does. As the catalog's owner."""
    await connection.execute(await connection.fetchval(_KEEP_MOVES, mover))


async def let_read(connection: Connection, app: str = APP) -> None:
    """Lets the services read the catalog, and whatever comes to it. As its owner."""
    await connection.execute(await connection.fetchval(_READ_ONLY, app))


async def let_keep_sync_sets(connection: Connection, app: str = APP) -> None:
    """Lets the shards' services write down whom their commits wait for. As the catalog's owner."""
    await connection.execute(await connection.fetchval(_KEEP_SYNC_SETS, app))


async def let_set_levels(connection: Connection, app: str = APP) -> None:
    """Lets the routers set degradation levels, as their operators ask them to. As the catalog's owner."""
    await connection.execute(await connection.fetchval(_SET_LEVELS, app))
