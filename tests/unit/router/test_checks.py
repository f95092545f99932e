"""What the health checks say of replicas, which come up while the first checks are made."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.catalog import Cluster, PlacementStrategy, Precision
from common.config import RouterSettings
from router.checks import Checks
from router.findings import Condition, Finding
from router.location import LocationCache
from router.replicas import Replicas
from router.topology_watch import TopologyWatch
from tests.support.eventually import eventually
from tests.unit.router.scripted import CLUSTER_ID, Router, router, servers

_CLUSTER = Cluster(CLUSTER_ID, "", 3, Precision.HALF, PlacementStrategy.USER_BASED, "english", bytes(32))
_SETTINGS = RouterSettings(catalog_dsn="postgresql://unused")  # type: ignore[arg-type]


async def _said(reader: Router, replicas: Replicas) -> Finding:
    """What the check of the one replica finds."""
    watch = TopologyWatch("postgresql://unused", reader.topology, poll_s=60, changed=lambda _: None)
    checks = Checks(_CLUSTER, watch, reader.shards, replicas, LocationCache(_SETTINGS), None, "postgresql://unused")
    (check,) = [check for check in checks.now() if check.name == "replica"]
    (finding,) = await check.ask()
    return finding


@asynccontextmanager
async def _looks(reader: Router) -> AsyncIterator[Replicas]:
    """What another router knows of the replica, which begins to look at it when the block begins."""
    replicas = Replicas(reader.shards, reader.topology, _SETTINGS)
    assert (await _said(reader, replicas)).condition is Condition.UNKNOWN
    looking = asyncio.create_task(replicas.run())
    try:
        yield replicas
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def _found(reader: Router, replicas: Replicas, condition: Condition) -> bool:
    return (await _said(reader, replicas)).condition is condition


async def test_a_replica_is_unknown_before_the_first_look_and_degraded_only_after_one() -> None:
    async with servers(1) as (primary, (replica,)), router(primary, replica) as reader, _looks(reader) as replicas:
        await eventually(lambda: _found(reader, replicas, Condition.HEALTHY))
        replica.freeze()
        await eventually(lambda: _found(reader, replicas, Condition.DEGRADED))


async def test_a_replica_that_is_away_from_the_beginning_is_found_to_be() -> None:
    async with servers(1) as (primary, (replica,)), router(primary, replica) as reader:
        replica.freeze()
        async with _looks(reader) as replicas:
            await eventually(lambda: _found(reader, replicas, Condition.DEGRADED))
