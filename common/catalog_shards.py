"""Shards in the catalog: one that comes, one that leaves, and what each may be used for."""

import asyncpg

from common.catalog import CatalogError, UnknownShardError, raise_epoch
from common.postgres import Connection
from common.topology import Shard, ShardStatus

_CREATE = "INSERT INTO shards (shard_id, address, weight, status) VALUES ($1, $2, $3, $4)"
_CREATE_REPLICA = "INSERT INTO replicas (shard_id, replica_id, address) VALUES ($1, $2, $3)"
_SET_STATUS = "UPDATE shards SET status = $2 WHERE shard_id = $1 RETURNING shard_id"
_SET_WEIGHT = "UPDATE shards SET weight = $2 WHERE shard_id = $1 RETURNING shard_id"
_OWNS = "SELECT EXISTS (SELECT FROM slot_ranges WHERE shard_id = $1)"
_IS_MOVING = """
SELECT EXISTS (SELECT FROM moves WHERE $1 IN (source, target) AND step NOT IN ('done', 'rolled_back'))
"""
# Moves are kept for ever: without one no shard that comes ever has slots, and none leaves that had some.
_HAD_SLOTS = """
SELECT EXISTS (SELECT FROM moves WHERE source = $1 OR (target = $1 AND cutover_epoch > 0))
"""
# A shard that comes has a log of its own: places in that of an earlier one of the same name mean nothing in it. What is
# known of those who got slots from there in turn is kept, as of those who had had them before.
_FOLLOW_ON = """
INSERT INTO cutovers AS known (source, target, timeline, lsn, epoch)
SELECT came.source, went.target, went.timeline, went.lsn, went.epoch
FROM cutovers AS came JOIN cutovers AS went ON went.source = came.target
WHERE came.target = $1 AND went.target <> came.source
ON CONFLICT (source, target) DO UPDATE SET timeline = excluded.timeline, lsn = excluded.lsn, epoch = excluded.epoch
    WHERE (known.timeline, known.lsn) < (excluded.timeline, excluded.lsn)
"""
_FORGET = "DELETE FROM cutovers WHERE target = $1"
_DROP_FROM = {
    table: f"DELETE FROM {table} WHERE shard_id = $1"  # noqa: S608  # Constants.
    for table in ("replicas", "sync_sets", "levels", "pins", "shards")
}


async def add_shard(connection: Connection, epoch: int, shard: Shard) -> int:
    """Adds a shard without slots, if the topology is still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not, CatalogError when there is a shard of this name, or was one that had
    slots: clients may hold consistency tokens with places in its log, which the new one's would never come to.
    """
    try:
        async with connection.transaction():
            raised = await raise_epoch(connection, epoch)
            await connection.execute(_CREATE, shard.shard_id, shard.address, shard.weight, shard.status.value)
            if await connection.fetchval(_HAD_SLOTS, shard.shard_id):
                raise CatalogError(
                    f"{shard.shard_id} is the name of a shard that had slots, and that clients may remember; "
                    "give the new one another"
                )
            await connection.execute(_FOLLOW_ON, shard.shard_id)
            await connection.execute(_FORGET, shard.shard_id)
            for replica in shard.replicas:
                await connection.execute(_CREATE_REPLICA, shard.shard_id, replica.replica_id, replica.address)
    except asyncpg.UniqueViolationError as error:
        raise CatalogError(f"there is a shard {shard.shard_id} already") from error
    return raised


async def remove_shard(connection: Connection, epoch: int, shard_id: str) -> int:
    """Removes a shard that has no slots, if the topology is still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not, CatalogError when it has slots or takes part in a move.
    """
    async with connection.transaction():
        raised = await raise_epoch(connection, epoch)
        if await connection.fetchval(_OWNS, shard_id):
            raise CatalogError(f"{shard_id} has slots; drain it first")
        if await is_moving(connection, shard_id):
            raise CatalogError(f"a move from or to {shard_id} is not over; `memshard moves list` shows it")
        for statement in _DROP_FROM.values():
            await connection.execute(statement, shard_id)
    return raised


async def is_moving(connection: Connection, shard_id: str) -> bool:
    """Whether a shard takes part in a move that is not over."""
    moving: bool = await connection.fetchval(_IS_MOVING, shard_id)
    return moving


async def set_status(connection: Connection, epoch: int, shard_id: str, status: ShardStatus) -> int:
    """Says what a shard may be used for, if the topology is still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not, UnknownShardError.
    """
    return await _set(connection, epoch, _SET_STATUS, shard_id, status.value)


async def set_weight(connection: Connection, epoch: int, shard_id: str, weight: int) -> int:
    """Sets a shard's share of the slots, if the topology is still at `epoch`; returns the new epoch.

    Raises EpochConflictError when it is not, UnknownShardError.
    """
    return await _set(connection, epoch, _SET_WEIGHT, shard_id, weight)


async def _set(connection: Connection, epoch: int, statement: str, shard_id: str, value: object) -> int:
    async with connection.transaction():
        raised = await raise_epoch(connection, epoch)
        if await connection.fetchval(statement, shard_id, value) is None:
            raise UnknownShardError(f"there is no shard {shard_id!r}")
    return raised
