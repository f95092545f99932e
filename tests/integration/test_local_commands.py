"""`memshard up`, `status` and `down`, as people run them, on a whole cluster."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from common import catalog
from local import leftovers
from tests.support.cluster import LocalCluster, command, free_port
from tests.support.databases import fresh_layout
from tests.support.eventually import eventually
from tests.support.wire import database, topology_of


@pytest_asyncio.fixture(scope="module")
async def one_shard() -> AsyncIterator[LocalCluster]:
    """A cluster of one shard and two routers, for tests that leave it running and healthy."""
    async with LocalCluster(shards=1, routers=2) as cluster:
        yield cluster


async def test_status_tells_every_process_and_shard(one_shard: LocalCluster) -> None:
    status = await one_shard.status()
    assert [(p["name"], p["role"], p["shard_id"]) for p in status["processes"]] == [
        ("supervisor", "supervisor", None),
        ("postgres-catalog", "postgres-primary", None),
        ("postgres-shard-0", "postgres-primary", "shard-0"),
        ("redis", "redis", None),
        ("shard-0", "shard", "shard-0"),
        ("router-0", "router", None),
        ("router-1", "router", None),
    ]
    assert all(process["healthy"] for process in status["processes"])
    assert all(psutil.pid_exists(process["pid"]) for process in status["processes"])
    shard = next(process for process in status["processes"] if process["name"] == "shard-0")
    assert status["shards"] == [
        {
            "shard_id": "shard-0",
            "status": "active",
            "slots": 16384,
            "primary": "postgres-shard-0",
            "replicas": [],
            "address": f"127.0.0.1:{shard['port']}",
            "durability": "LOCAL",
            "replication": [],
            "level": "auto",
        }
    ]
    assert status["epoch"] == 1
    routers = [process["port"] for process in status["processes"] if process["role"] == "router"]
    assert routers == [one_shard.port, one_shard.port + 1]
    table = await one_shard.run("status")
    assert max(map(len, table.splitlines())) <= 80


async def test_what_is_stored_is_found_through_either_router(one_shard: LocalCluster) -> None:
    host, port = one_shard.address.split(":")
    code, output = await command("add", "--user", "alice", "Alice drinks green tea", "--address", one_shard.address)
    assert code == 0, output
    other = f"{host}:{int(port) + 1}"
    code, output = await command("search", "--user", "alice", "what does she drink?", "--address", other)
    assert code == 0, output
    assert "green tea" in output


async def test_a_second_up_says_that_it_runs_already(one_shard: LocalCluster) -> None:
    code, output = await command("up", "--data-dir", str(one_shard.data_dir))
    assert code == 1
    assert one_shard.address in output
    assert str(one_shard.pid("supervisor")) in output


async def test_a_port_in_use_is_an_error_that_names_the_option() -> None:
    with fresh_layout() as layout, socket.socket() as stranger:
        stranger.bind(("127.0.0.1", free_port()))
        stranger.listen()
        port = str(stranger.getsockname()[1])
        for mode in ([], ["--detach"]):
            code, output = await command("up", "--port", port, "--data-dir", str(layout.root), *mode)
            assert code == 1
            assert "--port" in output


@pytest.mark.parametrize("name", ["shard-0", "router-0", "redis", "postgres-catalog", "postgres-shard-0"])
async def test_a_killed_process_is_started_again(one_shard: LocalCluster, name: str) -> None:
    killed = one_shard.kill(name)
    await eventually(lambda: one_shard.pid(name) != killed)
    await eventually(one_shard.healthy, within_s=30)
    log = one_shard.layout.log("supervisor").read_text()
    assert f"{name} was ended by SIGKILL" in log


async def test_a_service_that_cannot_start_fails_the_up_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARD_ROUTER_LOG_LEVEL", "whisper")
    with fresh_layout() as layout:
        arguments = ["--shards", "1", "--port", str(free_port()), "--data-dir", str(layout.root)]
        code, output = await command("up", "--detach", *arguments)
        assert code == 1
        assert "log_level" in output
        assert str(layout.log("router-0")) in output.replace("\n", "")
        assert leftovers.find(layout.root) == []


async def test_down_ends_everything_and_up_brings_everything_back() -> None:
    async with LocalCluster(shards=2, embedder="none", dimensions=3) as cluster:
        lines = '{"id": "0193a5b0-0000-7000-8000-000000000001", "content": "x", "embedding": [1, 2, 3]}\n'
        (cluster.data_dir / "memories.jsonl").write_text(lines)
        file = str(cluster.data_dir / "memories.jsonl")
        code, output = await command("import", file, "--user", "bob", "--address", cluster.address)
        assert code == 0, output
        before = cluster.plan().record
        assert "has stopped" in await cluster.down()
        assert leftovers.find(cluster.layout.root) == []
        status = await cluster.status()
        assert [process for process in status["processes"] if process["healthy"] or process["pid"]] == []
        assert status["epoch"] == 1
        assert "Nothing runs" in await cluster.down()
        cluster.options = []
        began = time.monotonic()
        await cluster.up()
        print(f"up again in {time.monotonic() - began:.1f} s")
        assert cluster.plan().record == before
        _, output = await command("list", "--user", "bob", "--json", "--address", cluster.address)
        assert "0193a5b0-0000-7000-8000-000000000001" in output


async def test_after_the_supervisors_sigkill_status_is_right_and_up_takes_over() -> None:
    async with LocalCluster(shards=1) as cluster:
        cluster.kill("supervisor")
        orphans = {found.process for found in leftovers.find(cluster.layout.root)}
        assert len(orphans) > 5
        status = await cluster.status()
        assert [process["name"] for process in status["processes"] if not process["healthy"]] == ["supervisor"]
        await cluster.up()
        assert not orphans & {found.process for found in leftovers.find(cluster.layout.root)}
        assert await cluster.healthy()
        cluster.kill("supervisor")
        assert "left behind" in await cluster.down()
        assert leftovers.find(cluster.layout.root) == []


async def test_ctrl_c_at_the_terminal_ends_a_cluster_in_the_foreground() -> None:
    with fresh_layout() as layout:
        cluster = ["--shards", "1", "--port", str(free_port()), "--data-dir", str(layout.root)]
        run = asyncio.create_task(command("up", *cluster))
        await eventually(lambda: '"event": "ready"' in layout.log("supervisor").read_text(), within_s=60)
        supervisor = json.loads(layout.state.read_text())["processes"][0]["pid"]
        # The terminal sends it to the whole process group; of ours only the supervisor is in it.
        assert all(os.getpgid(found.process.pid) != os.getpgid(supervisor) for found in leftovers.find(layout.root))
        os.kill(supervisor, signal.SIGINT)
        code, output = await run
        assert code == 0
        assert "memshard is ready in" in output
        assert "Stopped." in output
        assert leftovers.find(layout.root) == []
        order = [line for line in layout.log("supervisor").read_text().splitlines() if " ended in " in line]
        router, *middle, redis = [json.loads(line)["event"].split()[0] for line in order][:4]
        assert (router, sorted(middle), redis) == ("router-0", ["shard-0", "shard-0-replica-1"], "redis")


async def test_the_services_cannot_change_the_catalog(one_shard: LocalCluster) -> None:
    async with database(one_shard.catalog_dsn()) as reader:
        assert (await catalog.read_cluster(reader)).embedding_model == "wordllama-l2-supercat-256"
        assert not await reader.fetchval("SELECT has_table_privilege('topology', 'UPDATE')")


async def test_shards_with_weights_have_slots_in_proportion_and_keep_them() -> None:
    async with LocalCluster(shards=3, embedder="none", dimensions=3, options=["--weights", "1,2,1"]) as cluster:
        shards = (await cluster.status())["shards"]
        assert [(shard["shard_id"], shard["slots"]) for shard in shards] == [
            ("shard-0", 4096),
            ("shard-1", 8192),
            ("shard-2", 4096),
        ]
        assert [shard.weight for shard in (await topology_of(cluster.catalog_dsn())).shards] == [1, 2, 1]
        assert "8192" in await cluster.run("status")
        await cluster.down()
        code, output = await command("up", "--weights", "1,1,1", "--data-dir", str(cluster.data_dir))
        assert (code, "--weights 1,2,1, not 1,1,1" in " ".join(output.split())) == (2, True), output
