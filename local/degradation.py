"""Setting the degradation level of a shard or of the cluster in the catalog, from which every router has it."""

from common import catalog
from common.catalog import EpochConflictError, UnknownShardError
from common.errors import NotFound
from common.level import Level
from local.cluster import Plan
from local.errors import LocalClusterError
from local.sessions import as_owner

# The topology may change meanwhile, as by a failover.
_TRIES = 5
_TIMEOUT_S = 10.0


async def set_level(plan: Plan, shard_id: str, level: Level | None) -> int:
    """Sets it, or with None leaves it to the routers; the epoch of the topology that has it.

    `shard_id` is CLUSTER for the whole. Raises NotFound, LocalClusterError.
    """
    async with as_owner(plan.catalog_server(), plan.secrets, _TIMEOUT_S) as connection:
        for _ in range(_TRIES):
            try:
                return await catalog.set_level(connection, await catalog.read_epoch(connection), shard_id, level)
            except EpochConflictError:
                continue
            except UnknownShardError as error:
                known = ", ".join(plan.record.shard_ids())
                raise NotFound(f"{error}, only {known}", reason="SHARD_NOT_FOUND") from error
    raise LocalClusterError("the catalog keeps changing; the level could not be written to it")
