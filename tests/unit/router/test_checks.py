"""What the health checks say of replicas, which come up while the first checks are made, and of shards."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest

from common.breaker_log import logged
from common.breaker_settings import EMBEDDER
from common.catalog import Cluster, PlacementStrategy, Precision
from common.config import RouterSettings
from common.errors import DeadlineExceeded, MemshardError, OutcomeUnknown
from common.topology import CLUSTER, ShardStatus, Topology
from memshard.internal.v1.shard_pb2 import DescribeResponse
from router.checks import Checks
from router.findings import Condition, Finding, Report
from router.location import LocationCache
from router.monitor import Monitor
from router.recovery import Kind, Recovery, remedies
from router.remembered import Remembered
from router.replicas import Replicas
from router.topology_watch import TopologyWatch
from tests.support.eventually import eventually
from tests.unit.router.scripted import CLUSTER_ID, Router, Server, router, servers, shard

_CLUSTER = Cluster(CLUSTER_ID, "", 3, Precision.HALF, PlacementStrategy.USER_BASED, "english", bytes(32))
_SETTINGS = RouterSettings(catalog_dsn="postgresql://unused")  # type: ignore[arg-type]


def _checks(reader: Router, topology: Topology, replicas: Replicas) -> Checks:
    watch = TopologyWatch("postgresql://unused", topology, poll_s=60, changed=lambda _: None)
    return Checks(_CLUSTER, watch, reader.shards, replicas, LocationCache(_SETTINGS), None, "postgresql://unused")


async def _said(reader: Router, replicas: Replicas) -> Finding:
    """What the check of the one replica finds."""
    (check,) = [check for check in _checks(reader, reader.topology, replicas).now() if check.name == "replica"]
    (finding,) = await check.ask()
    return finding


async def _found_by(checks: Checks, name: str) -> list[Finding]:
    """What one check of the one shard finds, with those beside it."""
    report = await Monitor(lambda: [check for check in checks.now() if check.name == name]).look()
    return list(report.findings)


async def _found_of_the_shard(reader: Router, status: ShardStatus = ShardStatus.ACTIVE) -> list[Finding]:
    """All that is found of the one shard by the health monitor, with the shard set so."""
    (shard,) = reader.topology.shards
    topology = replace(reader.topology, shards=(replace(shard, status=status),))
    checks = _checks(reader, topology, reader.replicas)
    report = await Monitor(lambda: [check for check in checks.now() if check.subject == "shard-0"]).look()
    return list(report.findings)


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


async def test_replicas_of_one_name_are_two() -> None:
    """A replica's name is one of its shard's; what is found of one shard's, and tried, is not about the other's."""
    async with (
        servers(0) as (primary, _),
        router(primary) as reader,
        Server("reads") as well,
        Server("reads", "shard-1") as ill,
    ):
        ill.serving = False
        others = replace(shard(primary, [ill]), shard_id="shard-1")
        topology = replace(reader.topology, shards=(shard(primary, [well]), others))
        replicas = Replicas(reader.shards, topology, _SETTINGS)
        looking = asyncio.create_task(replicas.run())
        checks = _checks(reader, topology, replicas)

        async def found() -> list[Finding] | None:
            now = await _found_by(checks, "replica")
            said = {finding.subject: finding.condition for finding in now}
            expected = {"shard-0/reads": Condition.HEALTHY, "shard-1/reads": Condition.DEGRADED}
            return now if said == expected else None

        try:
            findings = await eventually(found)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        before = {server: reader.shards.channel(server.address) for server in (well, ill)}
        assert findings is not None
        nothing = cast("Remembered", None)  # Of which nothing is to be forgotten.
        attempts = await Recovery(reader.shards, nothing, lambda: topology).recover(Report.of(findings))
        assert {attempt.action.subject for attempt in attempts} == {"shard-1/reads"}
        assert reader.shards.channel(well.address) is before[well]
        assert reader.shards.channel(ill.address) is not before[ill]


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_shard_in_maintenance_is_left_alone(stopped: bool) -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        if stopped:
            await primary.stop()
        found = await _found_of_the_shard(reader, ShardStatus.MAINTENANCE)
        assert {"database", "synthetic"} <= {finding.name for finding in found}
        assert max(finding.condition for finding in found) is Condition.DEGRADED
        assert remedies(found) == []
        assert not primary.asked


async def test_one_that_is_away_without_having_been_told_is_not() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        await primary.stop()
        assert [action.subject for action in remedies(await _found_of_the_shard(reader))] == ["shard-0", "shard-0"]


@pytest.mark.parametrize(
    ("silent_ms", "error"),
    [
        (0, DeadlineExceeded("not in time")),
        (900, OutcomeUnknown("not in time")),
        (900, DeadlineExceeded("not in time")),
    ],
)
async def test_a_pool_that_is_merely_full_is_reported_as_such_and_left_alone(
    silent_ms: int, error: MemshardError
) -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.figures = DescribeResponse(pool_size=16, pool_in_use=16, database_silent_ms=silent_ms)
        primary.error = error
        checks = _checks(reader, reader.topology, reader.replicas)
        found = await _found_by(checks, "database") + await _found_by(checks, "synthetic")
        assert [finding.figure for finding in found if finding.name == "pool"] == [1.0]
        assert reader.shards.levels.pool_use == {"shard-0": 1.0}
        assert max(finding.condition for finding in found) is Condition.DEGRADED
        assert remedies(found) == []


async def test_connections_that_are_all_in_use_and_answer_nobody_are_replaced() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.figures = DescribeResponse(pool_size=16, pool_in_use=16, database_silent_ms=9_000)
        primary.error = DeadlineExceeded("not in time")
        checks = _checks(reader, reader.topology, reader.replicas)
        for name in ("database", "synthetic"):
            found = await _found_by(checks, name)
            assert [action.kind for action in remedies(found)] == [Kind.RECONNECT, Kind.RECYCLE_POOL]
        assert reader.shards.levels.pool_use == {"shard-0": 1.0}


async def test_a_full_pool_excuses_no_wrong_answer() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.figures = DescribeResponse(pool_size=16, pool_in_use=16)
        checks = _checks(reader, reader.topology, reader.replicas)
        await _found_by(checks, "database")
        assert remedies(await _found_by(checks, "synthetic"))


async def test_how_busy_a_shards_machine_is_counts_until_it_says_no_more() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        levels = reader.shards.levels
        primary.figures = DescribeResponse(cpu=0.8, memory=0.5)
        reader.shards.guards.of("shard-0")
        checks = _checks(reader, reader.topology, reader.replicas)
        await _found_by(checks, "database")
        levels.look()
        assert (levels.vitals["shard-0"].cpu, levels.vitals["shard-0"].memory) == (0.8, 0.5)
        assert (levels.vitals[CLUSTER].cpu, levels.vitals[CLUSTER].memory) == (0.0, 0.0)
        await primary.stop()
        await _found_by(checks, "database")
        levels.look()
        assert (levels.vitals["shard-0"].cpu, levels.vitals["shard-0"].memory) == (0.0, 0.0)


async def test_a_helper_that_is_away_is_told_of() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        levels = reader.shards.levels
        breaker = logged("the embedder", EMBEDDER)
        levels.dependencies.append(breaker)
        levels.look()
        (calls,) = [check for check in _checks(reader, reader.topology, reader.replicas).now() if check.name == "calls"]

        async def found() -> dict[tuple[str, str], Condition]:
            return {finding.key: finding.condition for finding in await calls.ask()}

        assert (await found())["breakers", CLUSTER] is Condition.HEALTHY
        for _ in range(EMBEDDER.consecutive_failures):
            breaker.admit().failure()
        assert (await found())["breakers", CLUSTER] is Condition.DEGRADED
        assert (await found())["level", CLUSTER] is Condition.HEALTHY
