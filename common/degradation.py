"""The level of a shard or of the cluster, set by an operator: it goes into the catalog, where each router finds it."""

from common import catalog
from common.catalog import EpochConflictError
from common.errors import InvalidArgument, NotFound, Unavailable
from common.level import Level
from common.postgres import Connection
from common.topology import CLUSTER
from memshard.admin.v1 import cluster_pb2

# The topology may change meanwhile, as by a failover.
_TRIES = 5


async def set_degradation(
    connection: Connection, request: cluster_pb2.SetDegradationRequest
) -> cluster_pb2.SetDegradationResponse:
    """Sets a level, or leaves it to the routers, on a connection to the catalog.

    Raises InvalidArgument, NotFound, Unavailable when the catalog keeps changing, and what its driver raises.
    """
    whose, level = request.shard_id, _level_of(request)
    for _ in range(_TRIES):
        topology = await catalog.read_topology(connection)
        known = [shard.shard_id for shard in topology.shards]
        if whose not in (CLUSTER, *known):
            raise NotFound(f"there is no shard {whose!r}, only {', '.join(known)}", reason="SHARD_NOT_FOUND")
        try:
            epoch = await catalog.set_level(connection, topology.epoch, whose, level)
        except EpochConflictError:
            continue
        return cluster_pb2.SetDegradationResponse(epoch=epoch)
    raise Unavailable("the catalog keeps changing; the level could not be written to it", reason="CATALOG_UNAVAILABLE")


def in_words(request: cluster_pb2.SetDegradationRequest) -> tuple[str, str]:
    """Whose level was set, and to what, for a log."""
    level = _level_of(request)
    return request.shard_id or "the cluster", level.name.lower() if level else "auto"


def _level_of(request: cluster_pb2.SetDegradationRequest) -> Level | None:
    try:
        return Level(request.level) if request.level else None
    except ValueError as error:
        raise InvalidArgument.field("level", "INVALID_ENUM", "is no degradation level") from error
