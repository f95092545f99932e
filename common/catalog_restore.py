"""Writing a catalog that was lost again, from what is known otherwise."""

from collections.abc import Mapping, Sequence

from common.catalog import CatalogError, Cluster, raise_epoch, upgrade
from common.postgres import Connection
from common.sync_set import SyncSet
from common.topology import Cutover, Shard, SlotRange

_HAS_TABLES = "SELECT to_regclass('cluster') IS NOT NULL"
_HAS_CLUSTER = "SELECT EXISTS (SELECT FROM cluster)"
_CREATE_CLUSTER = """
INSERT INTO cluster (cluster_id, embedding_model, dimensions, precision, placement, text_language, token_key)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""
_CREATE_TOPOLOGY = "INSERT INTO topology (epoch) VALUES ($1)"
_CREATE_SHARD = "INSERT INTO shards (shard_id, address, weight, status) VALUES ($1, $2, $3, $4)"
_CREATE_REPLICA = "INSERT INTO replicas (shard_id, replica_id, address) VALUES ($1, $2, $3)"
_CREATE_RANGE = "INSERT INTO slot_ranges (first, last, shard_id) VALUES ($1, $2, $3)"
_CREATE_CUTOVER = "INSERT INTO cutovers (source, target, timeline, lsn, epoch) VALUES ($1, $2, $3, $4, $5)"
_CREATE_SYNC_SET = "INSERT INTO sync_sets (shard_id, primary_server, members) VALUES ($1, $2, $3)"


async def check_empty(connection: Connection) -> None:
    """Raises CatalogError when there is a cluster in the catalog. It changes nothing: for those who are to change other
    things before they `restore`.
    """
    if await connection.fetchval(_HAS_TABLES) and await connection.fetchval(_HAS_CLUSTER):
        raise CatalogError("this catalog holds a cluster; only an empty one is written anew")


async def restore(  # What a catalog consists of.
    connection: Connection,
    cluster: Cluster,
    epoch: int,
    shards: Sequence[Shard],
    ranges: Sequence[SlotRange],
    cutovers: Sequence[Cutover],
    sync_sets: Mapping[str, SyncSet],
) -> int:
    """Fills an empty catalog, as the role that owns its database, all or nothing; returns its epoch, one above `epoch`.

    Raises CatalogError when there is a cluster in it: nothing has changed then.
    """
    await upgrade(connection)
    async with connection.transaction():
        await check_empty(connection)
        await connection.execute(
            _CREATE_CLUSTER,
            cluster.cluster_id,
            cluster.embedding_model,
            cluster.dimensions,
            cluster.precision.value,
            cluster.placement.value,
            cluster.text_language,
            cluster.token_key,
        )
        await connection.execute(_CREATE_TOPOLOGY, epoch)
        await connection.executemany(_CREATE_SHARD, [(s.shard_id, s.address, s.weight, s.status.value) for s in shards])
        await connection.executemany(
            _CREATE_REPLICA, [(s.shard_id, r.replica_id, r.address) for s in shards for r in s.replicas]
        )
        await connection.executemany(_CREATE_RANGE, [(r.first, r.last, r.shard_id) for r in ranges])
        await connection.executemany(
            _CREATE_CUTOVER, [(c.source, c.target, c.timeline, c.lsn, epoch) for c in cutovers]
        )
        await connection.executemany(
            _CREATE_SYNC_SET, [(name, known.primary, sorted(known.members)) for name, known in sync_sets.items()]
        )
        return await raise_epoch(connection, epoch)
