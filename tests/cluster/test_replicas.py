"""`memshard up` with its standbys and replicas, as people see them."""

import json
import os
import re
import shutil
import signal
import stat
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from local.admin_token import read_token
from memshard import AsyncMemoryClient
from memshard.admin.v1 import cluster_pb2, cluster_pb2_grpc
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.wire import database

ROLES = {
    "postgres-catalog": "postgres-primary",
    "postgres-shard-0": "postgres-primary",
    "postgres-shard-0-1": "postgres-standby",
    "redis": "redis",
    "router-0": "router",
    "shard-0": "shard",
    "shard-0-replica-1": "replica",
    "supervisor": "supervisor",
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running() -> AsyncIterator[LocalCluster]:
    """One shard with what it has by default. Tests leave it healthy; who is the primary may change."""
    async with LocalCluster(shards=1, replicas=None, embedder="none", dimensions=3) as cluster:
        yield cluster


async def is_quorum(cluster: LocalCluster) -> bool:
    return await cluster.healthy() and (await cluster.status())["shards"][0]["durability"] == "QUORUM"


def known_epoch(cluster: LocalCluster) -> int:
    """The epoch that status would tell if nothing ran."""
    return int(json.loads(cluster.layout.state.read_text())["topology"]["epoch"])


async def test_a_shard_has_a_standby_and_a_replica_by_default(running: LocalCluster) -> None:
    await eventually(lambda: is_quorum(running), within_s=30)
    status = await running.status()
    assert {process["name"]: process["role"] for process in status["processes"]} == ROLES
    (shard,) = status["shards"]
    assert (shard["primary"], shard["replicas"]) == ("postgres-shard-0", ["shard-0-replica-1"])
    (replica,) = shard["replication"]
    assert replica["name"] == "shard-0-replica-1"
    assert replica["timeline"] == 1
    assert 0 <= replica["lag_ms"] < 5000
    table = await running.run("status")
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"QUORUM +1: \d+\.\d s behind", table)


async def test_the_number_of_replicas_is_fixed_when_it_is_made(running: LocalCluster) -> None:
    code, output = await command("up", "--replicas", "2", "--data-dir", str(running.data_dir))
    assert code == 2
    assert "--replicas 1, not 2" in output


@pytest.mark.parametrize("role", ["replica", "postgres-standby"])
async def test_a_killed_replica_or_standby_comes_back(running: LocalCluster, role: str) -> None:
    (name,) = running.servers("shard-0", role)
    killed = running.kill(name)
    await eventually(lambda: running.pid(name) != killed)
    await eventually(running.healthy, within_s=30)


@pytest.mark.slow
async def test_a_standby_whose_directory_is_lost_is_made_anew_under_its_replica(running: LocalCluster) -> None:
    (name,) = running.standbys("shard-0")
    killed = running.kill(name)
    # It may be being started again at this moment.
    shutil.rmtree(running.plan().shard_servers("shard-0")[name].pgdata, ignore_errors=True)
    await eventually(lambda: running.pid(name) != killed, within_s=20)
    await eventually(lambda: is_quorum(running), within_s=30)


@pytest.mark.slow
async def test_a_failover_moves_the_roles_and_they_stay_when_all_is_started_again(running: LocalCluster) -> None:
    async with AsyncMemoryClient(running.address) as client:
        for number in range(2):
            await eventually(lambda: is_quorum(running), within_s=30)
            epoch = (await running.status())["epoch"]
            (old, new) = running.primary("shard-0"), *running.standbys("shard-0")
            await client.store("alice", f"before {number}", embedding=[1, 0, 0])
            output = await running.run("failover", "shard-0", "--to", new)
            assert f"{new} takes the writes of shard-0" in output
            await eventually(lambda: is_quorum(running), within_s=30)
            status = await running.status()
            assert (status["shards"][0]["primary"], status["epoch"]) == (new, epoch + 1)
            roles = {process["name"]: process["role"] for process in status["processes"]}
            assert (roles[old], roles[new]) == ("postgres-standby", "postgres-primary")
            if number == 0:
                await eventually(lambda expected=epoch + 1: known_epoch(running) == expected)  # type: ignore[misc]
                await running.down()
                running.options = []
                await running.up()
                await eventually(lambda: is_quorum(running), within_s=30)
                assert (await running.status())["shards"][0]["primary"] == new
        assert len((await client.list_memories("alice")).memories) == 2


async def test_a_failover_that_cannot_be_changes_nothing(running: LocalCluster) -> None:
    await eventually(lambda: is_quorum(running), within_s=30)
    primary = running.primary("shard-0")
    for arguments, said in (
        (("shard-7",), "there is no shard 'shard-7'"),
        (("shard-0", "--to", primary), f"{primary} is the primary of shard-0 already"),
        (("shard-0", "--to", "postgres-shard-1"), "has no server postgres-shard-1"),
    ):
        code, output = await command("failover", *arguments, "--data-dir", str(running.data_dir))
        assert code == 1
        assert said in output
    (standby,) = running.standbys("shard-0")
    pid, primarys_pid = running.pid(standby), running.pid(primary)
    os.kill(pid, signal.SIGSTOP)
    try:
        code, output = await command("failover", "shard-0", "--data-dir", str(running.data_dir))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert code == 1
    assert f"{standby} does not answer" in output
    assert running.pid(primary) == primarys_pid
    await eventually(lambda: is_quorum(running), within_s=30)


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", "wrong"),)])
async def test_the_admin_service_wants_the_token(running: LocalCluster, metadata: tuple[tuple[str, str], ...]) -> None:
    port = running.plan().record.ports["admin"]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for _ in stub.Failover(cluster_pb2.FailoverRequest(shard_id="shard-0"), metadata=metadata):
                pass
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    token = read_token(running.layout)
    assert stat.S_IMODE(running.layout.admin_token.stat().st_mode) == 0o600
    assert token not in running.logs()


async def test_the_services_can_keep_the_sync_set_and_nothing_else_of_the_catalog(running: LocalCluster) -> None:
    async with database(running.catalog_dsn()) as app:
        for table in ("sync_sets", "topology", "replicas"):
            assert not await app.fetchval("SELECT has_table_privilege($1, 'UPDATE')", table)
        rows = await app.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'sync_sets'::regclass AND attnum > 0"
            " AND has_column_privilege('sync_sets', attname, 'UPDATE')"
        )
        assert {row["attname"] for row in rows} == {"members", "following", "version"}
    async with database(running.shard_dsn("shard-0")) as app:
        assert await app.fetchval("SELECT pg_has_role('pg_monitor', 'USAGE')")
        assert not await app.fetchval("SELECT has_parameter_privilege('synchronous_standby_names', 'ALTER SYSTEM')")
    async with database(running.shard_dsn("shard-0", owner=True)) as owner:
        assert await owner.fetchval("SELECT has_parameter_privilege('synchronous_standby_names', 'ALTER SYSTEM')")
        assert await owner.fetchval("SELECT has_function_privilege('pg_reload_conf()', 'EXECUTE')")
