"""`memshard health | recover | stats` on a running cluster, whose parts are stopped one after the other."""

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from memshard.admin.v1 import cluster_pb2 as pb
from memshard.admin.v1 import cluster_pb2_grpc
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually

SERVICE = "memshard.admin.v1.ClusterService"
CHECKS = {
    *((name, shard) for name in ("database", "disk", "pool", "synthetic") for shard in ("shard-0", "shard-1")),
    *((name, of) for name in ("errors", "latency", "breakers", "level") for of in ("", "shard-0", "shard-1")),
    *(("replica", f"{shard}/{shard}-replica-1") for shard in ("shard-0", "shard-1")),
    *((name, "") for name in ("redis", "catalog", "embedder")),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running() -> AsyncIterator[LocalCluster]:
    # What is stopped here stays stopped until the test has seen it.
    async with LocalCluster(shards=2, replicas=1, options=["--hung-after", "0"]) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(running: LocalCluster) -> LocalCluster:
    """All of it healthy at the beginning of each test."""
    await eventually(lambda: overall(running, "healthy"), within_s=60)
    return running


async def asked(cluster: LocalCluster, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document of a command."""
    code, output = await command(*arguments, "--json", "--data-dir", str(cluster.data_dir))
    return code, json.loads(output)


async def overall(cluster: LocalCluster, expected: str) -> bool:
    """Whether `memshard health` says so, and its exit code with it."""
    code, document = await asked(cluster, "health")
    assert code == (0 if document["overall"] == "healthy" else 1)
    return bool(document["overall"] == expected)


async def findings(cluster: LocalCluster) -> dict[tuple[str, str], dict[str, Any]]:
    """Every check, by its name and what it is of."""
    _, document = await asked(cluster, "health", "--detailed")
    (router,) = document["routers"]
    return {(check["name"], check["subject"]): check for check in router["checks"]}


@contextmanager
def stopped(cluster: LocalCluster, name: str) -> Iterator[None]:
    pid = cluster.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def admin_address(cluster: LocalCluster) -> str:
    return f"127.0.0.1:{cluster.plan().record.ports['router-0-admin']}"


async def test_a_cluster_that_is_well_says_so_with_a_figure_for_each_thing(cluster: LocalCluster) -> None:
    await eventually(lambda: overall(cluster, "healthy"), within_s=30)
    code, document = await asked(cluster, "health", "--detailed")
    assert (code, document["overall"]) == (0, "healthy")
    (router,) = document["routers"]
    assert {(check["name"], check["subject"]) for check in router["checks"]} == CHECKS
    assert all(check["condition"] == "healthy" and check["figure"] is not None for check in router["checks"])
    code, output = await command("health", "--data-dir", str(cluster.data_dir))
    assert (code, output) == (0, "router-0 is healthy\n")
    code, output = await command("health", "--detailed", "--data-dir", str(cluster.data_dir))
    assert "synthetic  shard-1" in output
    assert "GiB free" in output


async def test_a_redis_that_hangs_degrades_it_and_costs_nothing_else(cluster: LocalCluster) -> None:
    with stopped(cluster, "redis"):
        await eventually(lambda: overall(cluster, "degraded"), within_s=30)
        found = await findings(cluster)
        assert found["redis", ""]["message"] in ("REDIS_UNAVAILABLE", "no answer in 2 s")
        assert found["synthetic", "shard-0"]["condition"] == "healthy"


async def test_a_catalog_that_hangs_is_cut_off_and_is_itself_what_is_found(cluster: LocalCluster) -> None:
    with stopped(cluster, "postgres-catalog"):
        await eventually(lambda: overall(cluster, "degraded"), within_s=30)
        assert (await findings(cluster))["catalog", ""]["message"] == "no answer in 2 s"


async def test_a_replica_that_hangs_is_found(cluster: LocalCluster) -> None:
    with stopped(cluster, "shard-1-replica-1"):
        await eventually(lambda: overall(cluster, "degraded"), within_s=30)
        assert (await findings(cluster))["replica", "shard-1/shard-1-replica-1"]["message"] == "does not serve"


@pytest.mark.timeout(240)
async def test_a_shard_that_hangs_is_found_and_what_may_help_is_tried_once_a_minute_and_told(
    cluster: LocalCluster,
) -> None:
    async def is_found() -> bool:
        found = await findings(cluster)
        told = [found[name, "shard-0"]["condition"] for name in ("database", "synthetic", "pool")]
        return told == ["unhealthy", "unhealthy", "unknown"] and found["synthetic", "shard-1"]["condition"] == "healthy"

    with stopped(cluster, "shard-0"):
        await eventually(is_found, within_s=30)
        code, document = await asked(cluster, "recover", "--test-after")
        assert code == 1
        (router,) = document["routers"]
        assert router["before"]["overall"] == router["after"]["overall"] == "unhealthy"
        attempts = {(a["action"], a["subject"]): a["outcome"] for a in router["attempts"]}
        # The router may have tried it by itself meanwhile.
        assert attempts["recycle_pool", "shard-0"] in ("failed", "limited")
        assert attempts["reconnect", "shard-0"] in ("done", "limited")
        _, document = await asked(cluster, "recover")
        again = [a["outcome"] for a in document["routers"][0]["attempts"] if a["subject"] == "shard-0"]
        assert again == ["limited", "limited"]
        _, stats = await asked(cluster, "stats")
        tried = [(a["action"], a["outcome"]) for a in stats["routers"][0]["recoveries"] if a["subject"] == "shard-0"]
        assert tried == [("reconnect", "done"), ("recycle_pool", "failed")]
    await eventually(lambda: overall(cluster, "healthy"), within_s=60)

    async def nothing_is_tried() -> bool:
        told = await command("recover", "--test-after", "--data-dir", str(cluster.data_dir))
        return told == (0, "router-0: nothing to try; it finds everything healthy\nrouter-0 is healthy\n")

    await eventually(nothing_is_tried, within_s=30)


async def test_stats_tell_breakers_limits_levels_and_the_rest(cluster: LocalCluster) -> None:
    code, document = await asked(cluster, "stats")
    assert code == 0
    (router,) = document["routers"]
    assert router["epoch"] >= 1
    breakers = {(breaker["callee"], breaker["kind"]): breaker["state"] for breaker in router["breakers"]}
    assert {("shard-0", "store"), ("shard-1", "search"), ("Redis", "all"), ("the catalog", "all")} <= breakers.keys()
    assert set(breakers.values()) <= {"closed", "half_open"}
    assert {limit["server"] for limit in router["limits"]} >= {"shard-0", "shard-1"}
    levels = {level["shard_id"]: (level["level"], level["set_by_operator"]) for level in router["levels"]}
    assert levels == {"": ("normal", False), "shard-0": ("normal", False), "shard-1": ("normal", False)}
    assert router["cache"]["believed"] is True
    assert router["retries"]["budget_left"] > 0
    assert router["entrance"]["shed"] >= 0
    assert router["moves"] == []
    assert (await command("stats", "--data-dir", str(cluster.data_dir)))[0] == 0


async def test_the_admin_port_is_found_without_a_data_directory_and_wants_its_token(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    address, wrong = admin_address(cluster), tmp_path / "token"
    wrong.write_text("not this one\n")
    for file, expected in ((cluster.layout.admin_token, 0), (wrong, 1)):
        for name in ("health", "stats", "recover"):
            code, output = await command(name, "--admin", address, "--token-file", str(file))
            assert code == expected, output
            assert ("this needs the token" in output) == bool(expected)
    assert (await command("health", "--admin", address))[0] == 2
    async with grpc.aio.insecure_channel(address) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        for call in (
            stub.GetHealth(pb.GetHealthRequest()),
            stub.GetStats(pb.GetStatsRequest()),
            stub.Recover(pb.RecoverRequest()),
            stub.SetDegradation(pb.SetDegradationRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(address) as blocking:
        assert SERVICE in ProtoReflectionDescriptorDatabase(blocking).get_services()


async def test_a_router_that_does_not_answer_is_unhealthy(cluster: LocalCluster) -> None:
    pid = cluster.kill("router-0")
    code, document = await asked(cluster, "health")
    if cluster.pid("router-0") == pid:
        assert (code, document["overall"]) == (1, "unhealthy")
    await eventually(lambda: cluster.pid("router-0") != pid)


@pytest.mark.timeout(180)
async def test_a_service_that_hangs_is_started_again_and_a_database_is_not() -> None:
    async with LocalCluster(shards=1, options=["--hung-after", "6"]) as cluster:
        hung = cluster.kill("shard-0", signal.SIGSTOP)
        catalog = cluster.kill("postgres-catalog", signal.SIGSTOP)
        await eventually(lambda: cluster.pid("shard-0") != hung, within_s=60)
        assert cluster.pid("postgres-catalog") == catalog
        os.kill(catalog, signal.SIGCONT)
        await eventually(lambda: overall(cluster, "healthy"), within_s=60)
        assert f"shard-0 (pid {hung}) has not answered for 6 s; ending it" in cluster.logs()
