"""`memshard degrade`: a level set by hand holds for exactly whom it was set for, until it is changed."""

import itertools
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.bearer import credentials
from common.level import Level
from common.roles import let_set_levels
from local.cluster import admin_of
from memshard.admin.v1 import cluster_pb2, cluster_pb2_grpc
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

_READ_ONLY = (grpc.StatusCode.FAILED_PRECONDITION, "READ_ONLY")


@dataclass
class Degradable:
    """A cluster of two shards, and a user of each."""

    cluster: LocalCluster
    api: "MemoryServiceAsyncStub"
    users: dict[str, str]

    async def degrade(self, *arguments: str) -> None:
        await self.cluster.run("degrade", *arguments)

    async def writes(self, shard_id: str) -> tuple[grpc.StatusCode, str] | None:
        """How a store for the shard's user ends; None: well."""
        try:
            await self.api.StoreMemory(store_request(self.users[shard_id], "more"))
        except grpc.aio.AioRpcError as error:
            return error.code(), reason_of(error)
        return None

    async def level(self, shard_id: str) -> int:
        """The level that a read of the shard's user says; the read itself must succeed."""
        listed = await self.api.ListMemories(pb.ListMemoriesRequest(user_id=self.users[shard_id], page_size=1))
        assert listed.memories
        return listed.report.degradation_level

    async def serving(self, service: str = "") -> bool:
        async with grpc.aio.insecure_channel(self.cluster.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running() -> AsyncIterator[Degradable]:
    async with LocalCluster(shards=2) as cluster, memory_service(cluster.address) as api:
        topology = await topology_of(cluster.catalog_dsn())
        users: dict[str, str] = {}
        for number in itertools.count():
            users.setdefault(topology.owner(user_slot(f"user-{number}")).shard_id, f"user-{number}")
            if len(users) == 2:
                break
        for user in users.values():
            await api.StoreMemory(store_request(user, "kept"))
        yield Degradable(cluster, api, users)


@pytest_asyncio.fixture(loop_scope="session")
async def degradable(running: Degradable) -> AsyncIterator[Degradable]:
    """At its own levels before and after."""
    yield running
    for arguments in (["auto"], ["auto", "--shard", "shard-0"], ["auto", "--shard", "shard-1"]):
        await running.degrade(*arguments)
    await eventually(running.serving)


async def test_a_readonly_shard_refuses_writes_and_is_read_and_the_other_does_not_notice(
    degradable: Degradable,
) -> None:
    await degradable.degrade("readonly", "--shard", "shard-1")

    async def refused() -> bool:
        return await degradable.writes("shard-1") == _READ_ONLY

    await eventually(refused)
    assert await degradable.level("shard-1") == pb.DEGRADATION_LEVEL_READONLY
    assert await degradable.writes("shard-0") is None
    assert await degradable.level("shard-0") == pb.DEGRADATION_LEVEL_NORMAL
    status = await degradable.cluster.status()
    assert [(shard["shard_id"], shard["level"]) for shard in status["shards"]] == [
        ("shard-0", "auto"),
        ("shard-1", "readonly"),
    ]
    assert status["level"] == "auto"
    await degradable.degrade("auto", "--shard", "shard-1")
    await eventually(lambda: _is_none(degradable, "shard-1"))
    assert await degradable.level("shard-1") == pb.DEGRADATION_LEVEL_NORMAL


async def test_a_cluster_in_maintenance_says_so_and_a_router_that_starts_again_still_does(
    degradable: Degradable,
) -> None:
    await degradable.degrade("maintenance")

    async def not_serving() -> bool:
        return not await degradable.serving() and not await degradable.serving("memshard.v1.MemoryService")

    await eventually(not_serving)
    assert await degradable.writes("shard-0") == await degradable.writes("shard-1") == _READ_ONLY
    assert await degradable.level("shard-0") == pb.DEGRADATION_LEVEL_MAINTENANCE
    assert "was set to maintenance" in (await command("status", "--data-dir", str(degradable.cluster.data_dir)))[1]

    killed = degradable.cluster.kill("router-0")
    await eventually(lambda: degradable.cluster.pid("router-0") != killed)
    await eventually(not_serving)
    assert await degradable.writes("shard-1") == _READ_ONLY
    await degradable.degrade("auto")
    await eventually(degradable.serving)
    assert await degradable.writes("shard-0") is None


async def test_a_level_is_kept_while_the_whole_cluster_is_down_and_it_starts_all_the_same(
    degradable: Degradable,
) -> None:
    await degradable.degrade("maintenance")
    await degradable.cluster.down()
    await degradable.cluster.up()
    assert not await degradable.serving()
    assert await degradable.writes("shard-0") == _READ_ONLY


async def test_a_router_sets_levels_for_whoever_has_its_token_and_no_data_directory(
    degradable: Degradable, tmp_path: Path
) -> None:
    cluster = degradable.cluster
    port = cluster.plan().record.ports[admin_of("router-0")]
    router = ("--admin", f"127.0.0.1:{port}", "--token-file")
    token, wrong = str(cluster.layout.admin_token), tmp_path / "token"
    wrong.write_text("not this one\n")
    code, output = await command("degrade", "readonly", "--shard", "shard-1", *router, str(wrong))
    assert (code, "this needs the token" in output) == (1, True)
    code, output = await command("degrade", "readonly", "--shard", "shard-1", *router, token)
    assert code == 0, output
    assert "The degradation level of shard-1 is set to readonly" in output

    async def refused() -> bool:
        return await degradable.writes("shard-1") == _READ_ONLY

    await eventually(refused)
    assert await degradable.writes("shard-0") is None
    # It is in the catalog, and not in that router alone.
    assert (await topology_of(cluster.catalog_dsn())).levels == {"shard-1": Level.READONLY}
    code, output = await command("degrade", "readonly", "--shard", "shard-7", *router, token)
    assert (code, "there is no shard 'shard-7', only shard-0, shard-1" in output) == (1, True)
    code, output = await command("degrade", "auto", "--shard", "shard-1", *router, token)
    assert code == 0, output
    await eventually(lambda: _is_none(degradable, "shard-1"))
    assert (await command("degrade", "auto", *router[:2]))[0] == 2


async def test_a_router_whose_role_may_only_read_says_so(degradable: Degradable) -> None:
    cluster = degradable.cluster
    port = cluster.plan().record.ports[admin_of("router-0")]
    router = ("--admin", f"127.0.0.1:{port}", "--token-file", str(cluster.layout.admin_token))
    async with database(cluster.catalog_dsn(owner=True)) as owner:
        await owner.execute("REVOKE EXECUTE ON FUNCTION set_level FROM memshard_app")
        try:
            code, output = await command("degrade", "readonly", *router)
        finally:
            await let_set_levels(owner)
    assert (code, "role may not set levels in the catalog" in " ".join(output.split())) == (1, True)
    assert (await topology_of(cluster.catalog_dsn())).levels == {}
    code, output = await command("degrade", "auto", *router)
    assert code == 0, output


async def test_a_router_says_when_its_catalog_is_away(degradable: Degradable) -> None:
    cluster = degradable.cluster
    port = cluster.plan().record.ports[admin_of("router-0")]
    pid = cluster.kill("postgres-catalog", signal.SIGSTOP)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = cluster_pb2_grpc.ClusterServiceStub(channel)
            metadata = credentials(cluster.layout.admin_token.read_text().strip())
            with pytest.raises(grpc.aio.AioRpcError) as away:
                await stub.SetDegradation(cluster_pb2.SetDegradationRequest(), metadata=metadata, timeout=6)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (away.value.code(), reason_of(away.value)) == (grpc.StatusCode.UNAVAILABLE, "CATALOG_UNAVAILABLE")


async def test_what_cannot_be_is_refused_in_words(degradable: Degradable) -> None:
    directory = ("--data-dir", str(degradable.cluster.data_dir))
    code, output = await command("degrade", "readonly", "--shard", "shard-7", *directory)
    assert (code, "there is no shard 'shard-7', only shard-0, shard-1" in output) == (1, True)
    assert (await command("degrade", "sometimes", *directory))[0] == 2
    assert (await command("degrade", "readonly", "--shard", "", *directory))[0] == 2


async def _is_none(degradable: Degradable, shard_id: str) -> bool:
    return await degradable.writes(shard_id) is None
