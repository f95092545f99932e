"""The catalog: one PostgreSQL database that is the source of topology and of what was fixed when the cluster was made.

Topology changes are compare-and-set: they name the epoch they were planned against, raise it by one, and notify.
"""

import re
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import asyncpg

from common.catalog_schema import MIGRATIONS
from common.level import Level
from common.migrations import migrate
from common.postgres import Connection
from common.slots import share_out
from common.sync_set import SyncSet
from common.topology import Cutover, Replica, Shard, ShardStatus, SlotRange, Topology

# Channel that a changed epoch is announced on; the payload is the epoch.
CHANNEL = "memshard_topology"

TOKEN_KEY_BYTES = 32


class Precision(StrEnum):
    """How embeddings are stored: `half` is 2 bytes a number, `single` 4."""

    HALF = "half"
    SINGLE = "single"


class PlacementStrategy(StrEnum):
    """What decides a memory's slot. Only `user_based` keeps a user on one shard."""

    USER_BASED = "user_based"
    CONTENT_HASH = "content_hash"
    TEMPORAL = "temporal"
    MEMORY_TYPE = "memory_type"


# PostgreSQL's text search configurations have names like this; whether one exists, the shard finds out.
TEXT_LANGUAGE = re.compile(r"[a-z][a-z_]{0,62}")
DEFAULT_TEXT_LANGUAGE = "english"

# pgvector's limits for an HNSW index, which a user above some 10,000 memories will need.
MAX_DIMENSIONS = {Precision.HALF: 4000, Precision.SINGLE: 2000}


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is fixed when a cluster is made."""

    cluster_id: str
    embedding_model: str
    """Name of the model whose embeddings are stored; empty when callers bring their own."""
    dimensions: int
    precision: Precision
    placement: PlacementStrategy
    text_language: str
    """PostgreSQL's text search configuration for keyword search, like `english` or `simple`."""
    token_key: bytes = field(repr=False)
    """Secret that page tokens and consistency tokens are signed with, 32 bytes."""


class CatalogError(Exception):
    """The catalog is not what was expected; the message says what to do."""


class EpochConflictError(CatalogError):
    """The topology has changed since the change at hand was planned; nothing was done."""


class UnknownShardError(CatalogError):
    """There is no such shard; nothing was done."""


class SyncSetConflictError(CatalogError):
    """The sync set, or the primary, has changed since the change at hand was planned; nothing was done."""


_CREATE_CLUSTER = """
INSERT INTO cluster (cluster_id, embedding_model, dimensions, precision, placement, text_language, token_key)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT DO NOTHING
RETURNING cluster_id
"""
_CREATE_TOPOLOGY = "INSERT INTO topology (epoch) VALUES (1)"
_CREATE_SHARD = "INSERT INTO shards (shard_id, address, weight, status) VALUES ($1, $2, $3, $4)"
_CREATE_RANGE = "INSERT INTO slot_ranges (first, last, shard_id) VALUES ($1, $2, $3)"
_READ_CLUSTER = """
SELECT cluster_id::text, embedding_model, dimensions, precision, placement, text_language, token_key FROM cluster
"""
_READ_EPOCH = "SELECT epoch FROM topology"
_READ_SHARDS = "SELECT shard_id, address, weight, status FROM shards ORDER BY shard_id"
_READ_RANGES = "SELECT first, last, shard_id FROM slot_ranges ORDER BY first"
_RAISE_EPOCH = "UPDATE topology SET epoch = epoch + 1 WHERE epoch = $1 RETURNING epoch"
_NOTIFY = "SELECT pg_notify($1, $2)"
_READ_CUTOVERS = "SELECT source, target, timeline, lsn FROM cutovers ORDER BY source, target"
_SET_ADDRESS = "UPDATE shards SET address = $2 WHERE shard_id = $1 AND address <> $2"
_READ_REPLICAS = "SELECT shard_id, replica_id, address FROM replicas ORDER BY shard_id, replica_id"
_DROP_REPLICAS = "DELETE FROM replicas WHERE shard_id = $1"
_CREATE_REPLICA = "INSERT INTO replicas (shard_id, replica_id, address) VALUES ($1, $2, $3)"
_READ_LEVELS = "SELECT shard_id, level FROM levels ORDER BY shard_id"
# A function, as the services may call it, and may not write to what it writes to.
_SET_LEVEL = "SELECT set_level($1, $2, $3)"
_READ_SYNC_SET = "SELECT primary_server, members, following, version FROM sync_sets WHERE shard_id = $1"
_CREATE_SYNC_SET = """
INSERT INTO sync_sets (shard_id, primary_server, members) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
"""
_CHANGE_SYNC_SET = """
UPDATE sync_sets SET members = $3, following = $4, version = version + 1
WHERE shard_id = $1 AND version = $2 AND primary_server = $5
RETURNING version
"""
_CHANGE_PRIMARY = """
UPDATE sync_sets SET primary_server = $3, members = $4, following = NULL, version = version + 1
WHERE shard_id = $1 AND version = $2
RETURNING version
"""


async def create(
    connection: Connection,
    shards: Sequence[Shard],
    *,
    embedding_model: str,
    dimensions: int,
    precision: Precision = Precision.HALF,
    placement: PlacementStrategy = PlacementStrategy.USER_BASED,
    text_language: str = DEFAULT_TEXT_LANGUAGE,
) -> Cluster:
    """Makes a new cluster in an empty database: its identity, its shards, and their slots by weight, at epoch 1.

    Raises CatalogError when the database already holds a cluster, ValueError for dimensions or a
    language that cannot be.
    """
    if not 1 <= dimensions <= MAX_DIMENSIONS[precision]:
        raise ValueError(f"dimensions must be 1 to {MAX_DIMENSIONS[precision]} at {precision} precision")
    if not TEXT_LANGUAGE.fullmatch(text_language):
        raise ValueError(
            "a text language is the name of a PostgreSQL text search configuration, like english or simple"
        )
    await upgrade(connection)
    cluster_id, token_key = str(uuid.uuid4()), secrets.token_bytes(TOKEN_KEY_BYTES)
    ranges = share_out({shard.shard_id: shard.weight for shard in shards})
    async with connection.transaction():
        made = await connection.fetchval(
            _CREATE_CLUSTER,
            cluster_id,
            embedding_model,
            dimensions,
            precision.value,
            placement.value,
            text_language,
            token_key,
        )
        if made is None:
            raise CatalogError("this catalog already holds a cluster")
        await connection.execute(_CREATE_TOPOLOGY)
        await connection.executemany(_CREATE_SHARD, [(s.shard_id, s.address, s.weight, s.status.value) for s in shards])
        await connection.executemany(
            _CREATE_REPLICA, [(s.shard_id, r.replica_id, r.address) for s in shards for r in s.replicas]
        )
        await connection.executemany(
            _CREATE_RANGE, [(first, last, shard_id) for shard_id, (first, last) in ranges.items()]
        )
    return await read_cluster(connection)


async def upgrade(connection: Connection) -> None:
    """Brings the catalog's tables up to date, as the role that owns them. Raises NewerSchemaError."""
    await migrate(connection, MIGRATIONS)


async def read_cluster(connection: Connection) -> Cluster:
    """What was fixed when the cluster was made. Raises CatalogError when there is no cluster."""
    try:
        row = await connection.fetchrow(_READ_CLUSTER)
    except asyncpg.UndefinedTableError:
        row = None
    if row is None:
        raise CatalogError("this catalog holds no cluster yet; `memshard up` makes one")
    return Cluster(
        cluster_id=row["cluster_id"],
        embedding_model=row["embedding_model"],
        dimensions=row["dimensions"],
        precision=Precision(row["precision"]),
        placement=PlacementStrategy(row["placement"]),
        text_language=row["text_language"],
        token_key=row["token_key"],
    )


async def read_epoch(connection: Connection) -> int:
    """The current epoch alone: what a poll asks before it reads the rest."""
    epoch: int = await connection.fetchval(_READ_EPOCH)
    return epoch


async def read_topology(connection: Connection) -> Topology:
    """The whole topology, of one moment. Raises CatalogError when there is no cluster."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        cluster = await read_cluster(connection)
        epoch = await connection.fetchval(_READ_EPOCH)
        shards = await connection.fetch(_READ_SHARDS)
        ranges = await connection.fetch(_READ_RANGES)
        replicas = await connection.fetch(_READ_REPLICAS)
        levels = await connection.fetch(_READ_LEVELS)
        cutovers = await connection.fetch(_READ_CUTOVERS)
    try:
        return Topology(
            cluster_id=cluster.cluster_id,
            epoch=epoch,
            shards=tuple(
                Shard(
                    row["shard_id"],
                    row["address"],
                    row["weight"],
                    ShardStatus(row["status"]),
                    tuple(
                        Replica(replica["replica_id"], replica["address"])
                        for replica in replicas
                        if replica["shard_id"] == row["shard_id"]
                    ),
                )
                for row in shards
            ),
            ranges=tuple(SlotRange(row["first"], row["last"], row["shard_id"]) for row in ranges),
            levels={row["shard_id"]: Level[row["level"].upper()] for row in levels},
            cutovers=tuple(Cutover(row["source"], row["target"], row["timeline"], row["lsn"]) for row in cutovers),
        )
    except ValueError as error:
        raise CatalogError(f"the catalog's topology at epoch {epoch} cannot be: {error}") from error


async def set_addresses(connection: Connection, epoch: int, addresses: Mapping[str, str]) -> int:
    """Changes where shards are reached, if the topology is still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not.
    """
    async with connection.transaction():
        raised = await raise_epoch(connection, epoch)
        await connection.executemany(_SET_ADDRESS, list(addresses.items()))
    return raised


async def set_replicas(connection: Connection, epoch: int, replicas: Mapping[str, Sequence[Replica]]) -> int:
    """Replaces the replicas of the shards named, if the topology is still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not.
    """
    async with connection.transaction():
        raised = await raise_epoch(connection, epoch)
        for shard_id, of_shard in replicas.items():
            await connection.execute(_DROP_REPLICAS, shard_id)
            await connection.executemany(_CREATE_REPLICA, [(shard_id, r.replica_id, r.address) for r in of_shard])
    return raised


async def set_level(connection: Connection, epoch: int, shard_id: str, level: Level | None) -> int:
    """Sets the degradation level of a shard or of CLUSTER, or with None leaves it to the routers, if the topology is
    still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not, UnknownShardError.
    """
    name = None if level is None else level.name.lower()
    try:
        raised: int | None = await connection.fetchval(_SET_LEVEL, epoch, shard_id, name)
    except asyncpg.NoDataFoundError as error:
        raise UnknownShardError(f"there is no shard {shard_id!r}") from error
    if raised is None:
        raise _conflict(epoch)
    return raised


async def create_sync_set(connection: Connection, shard_id: str, sync_set: SyncSet) -> None:
    """Records a new shard's primary and sync set; does nothing when the shard has one."""
    await connection.execute(_CREATE_SYNC_SET, shard_id, sync_set.primary, sorted(sync_set.members))


async def read_sync_set(connection: Connection, shard_id: str) -> SyncSet | None:
    """A shard's primary and sync set; None when nobody keeps one for it here."""
    row = await connection.fetchrow(_READ_SYNC_SET, shard_id)
    if row is None:
        return None
    return SyncSet(
        primary=row["primary_server"],
        members=frozenset(row["members"]),
        following=None if row["following"] is None else frozenset(row["following"]),
        version=row["version"],
    )


async def change_sync_set(
    connection: Connection,
    shard_id: str,
    planned: SyncSet,
    *,
    members: frozenset[str],
    following: frozenset[str] | None,
) -> SyncSet:
    """Changes the standbys that commits wait for, if nothing has changed since `planned` was read; returns the new set.

    Raises SyncSetConflictError when something has.
    """
    version = await connection.fetchval(
        _CHANGE_SYNC_SET,
        shard_id,
        planned.version,
        sorted(members),
        None if following is None else sorted(following),
        planned.primary,
    )
    if version is None:
        raise SyncSetConflictError(f"the sync set of {shard_id} is no longer what it was")
    return SyncSet(planned.primary, members, following, version)


async def change_primary(
    connection: Connection, epoch: int, shard_id: str, planned: SyncSet, *, primary: str, members: frozenset[str]
) -> SyncSet:
    """Records that `primary` is to take a shard's writes, and raises the epoch: what a promotion begins with.

    Raises EpochConflictError, SyncSetConflictError when something has changed since it was planned.
    """
    async with connection.transaction():
        await raise_epoch(connection, epoch)
        version = await connection.fetchval(_CHANGE_PRIMARY, shard_id, planned.version, primary, sorted(members))
        if version is None:
            raise SyncSetConflictError(f"the sync set of {shard_id} is no longer what it was")
    return SyncSet(primary, members, None, version)


async def raise_epoch(connection: Connection, epoch: int) -> int:
    """The compare-and-set that every topology change begins with, inside its transaction."""
    raised: int | None = await connection.fetchval(_RAISE_EPOCH, epoch)
    if raised is None:
        raise _conflict(epoch)
    await connection.execute(_NOTIFY, CHANNEL, str(raised))
    return raised


def _conflict(epoch: int) -> EpochConflictError:
    return EpochConflictError(f"the topology is no longer at epoch {epoch}")
