"""`memshard load` on a real cluster, and the benchmark from its beginning to its end with little data."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from loadtest.bench.cluster import Side, fill_same_table, make_same_table
from loadtest.bench.contender import Endpoint
from loadtest.profile import Operation
from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster, command
from tests.support.wire import database

_MEMSHARD = Path(sys.executable).parent / "memshard"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster() -> AsyncIterator[LocalCluster]:
    async with LocalCluster(shards=2) as running:
        yield running


async def _load(cluster: LocalCluster, *arguments: str) -> tuple[int, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        str(_MEMSHARD), "load", *arguments, "--address", cluster.address, "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert output, errors.decode()
    document: dict[str, Any] = json.loads(output)
    return process.returncode or 0, document


async def test_every_operation_succeeds_through_the_client(cluster: LocalCluster) -> None:
    code, report = await _load(cluster, "smoke", "--client", "sdk", "--duration", "4")
    assert (code, report["errorDistribution"]) == (0, {})
    assert report["operations"].keys() == {operation.value for operation in Operation}
    assert report["count"] == sum(one["count"] for one in report["operations"].values()) > 100


async def test_every_operation_succeeds_through_the_stubs_in_an_open_loop(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    profile = tmp_path / "open.yaml"
    operations = ", ".join(f"{operation.value}: 1" for operation in Operation)
    profile.write_text(
        f"operations: {{{operations}}}\nrate: 40\nconcurrency: 8\nduration_s: 4\nwarm_up_s: 0.5\nbatch: 5\n"
        "data: {users: 5, memories: 10, zipf: 1.0}\n"
    )
    code, report = await _load(cluster, str(profile), "--client", "stub")
    assert (code, report["errorDistribution"]) == (0, {})
    assert report["operations"].keys() == {operation.value for operation in Operation}
    assert 100 < report["count"] < 230


async def test_what_is_stored_first_is_stored_once(cluster: LocalCluster) -> None:
    for _ in range(2):
        code, _ = await _load(cluster, "smoke", "--client", "stub", "--duration", "0.1")
        assert code == 0
    async with AsyncMemoryClient(cluster.address) as client:
        found = [memory async for memory in client.iter_memories("load-0-3")]
    prepared = {memory.id for memory in found}
    assert len(prepared) == len(found)


async def test_ctrl_c_ends_it_with_a_report(cluster: LocalCluster) -> None:
    process = await asyncio.create_subprocess_exec(
        str(_MEMSHARD), "load", "smoke", "--duration", "60", "--address", cluster.address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while b"warm up" not in (line := await process.stderr.readline()):
        assert line
    await asyncio.sleep(3)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(20):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"It was ended early." in output
    assert b"Status code distribution:\n  [OK]" in output


async def test_a_limit_that_does_not_hold_is_exit_code_1(cluster: LocalCluster, tmp_path: Path) -> None:
    profile = tmp_path / "strict.yaml"
    profile.write_text(
        "operations: {get: 1}\nconcurrency: 2\nduration_s: 0.5\ndata: {users: 2, memories: 2}\n"
        "limits: {p99_ms: {get: 0.001}}\n"
    )
    code, report = await _load(cluster, str(profile))
    assert code == 1
    assert report["limitsExceeded"][0].startswith("p99 of get:")


@pytest.mark.parametrize("client", ["sdk", "stub"])
async def test_reads_tell_whether_caches_gave_them(cluster: LocalCluster, tmp_path: Path, client: str) -> None:
    profile = tmp_path / "cached.yaml"
    profile.write_text(
        "operations: {get: 1}\nrate: 100\nduration_s: 2\ndata: {users: 2, memories: 2}\nread: session\n"
        "limits: {errors: 0, cache_hit_ratio: 0.8}\n"
    )
    code, report = await _load(cluster, str(profile), "--client", client)
    assert (code, report["limitsExceeded"]) == (0, [])
    assert report["cacheHitRatio"] >= 0.8


async def test_nobody_there_is_said_in_a_line(tmp_path: Path) -> None:
    profile = tmp_path / "any.yaml"
    profile.write_text("operations: {get: 1}\nconcurrency: 2\nduration_s: 0.5\ntimeout_s: 1\n")
    code, output = await command("load", str(profile), "--address", "127.0.0.1:1", "--no-prepare", "--json")
    assert code == 1
    assert '"UNAVAILABLE"' in output
    assert "Traceback" not in output


async def test_the_table_like_the_shards_is_filled_like_it(cluster: LocalCluster) -> None:
    async with AsyncMemoryClient(cluster.address) as client:
        for number in range(20):
            await client.store(f"as-full-{number}", "likes tea")
    dsn = cluster.shard_dsn("shard-0", owner=True)
    await make_same_table(dsn)
    table = Endpoint(dsn=dsn, table="copied_memories", column="halfvec")
    await fill_same_table([Side("COPY into the shard's table", "same_table", table, ("bulk",))])
    async with database(dsn) as connection:
        # Without those of the health monitor, which come and go.
        held = await connection.fetchval("SELECT count(*) FROM memories WHERE user_id LIKE 'as-full-%'")
        copied = await connection.fetchval("SELECT count(*) FROM copied_memories WHERE user_id LIKE 'as-full-%'")
        await connection.execute("DROP TABLE copied_memories")
    assert held == copied > 0


async def test_the_benchmark_measures_everybody(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.bench", "--quick", "--json", str(figures),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    document = json.loads(figures.read_text())
    assert re.search(r"PostgreSQL [\d.]+, vector [\d.]+", document["run"]["where"])
    assert document["run"]["command"] == f"python -m loadtest.bench --quick --json {figures}"
    assert document["left_out"] == {"Chroma server": "not wanted", "mem0 on pgvector": "not wanted"}
    sections = document["sections"]
    assert sections.keys() == {"search", "store", "get", "get-hot", "bulk"}
    for section, by_name in sections.items():
        assert "asyncpg, vector" in by_name
        assert "memshard" in by_name
        assert all(one["rate"] > 0 for one in by_name.values()), section
    assert sections["search"]["memshard"]["recall"] >= 0.99
    assert b"### search one user" in output
