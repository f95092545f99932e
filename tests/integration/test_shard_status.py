"""A shard's status in the catalog says what it may be asked: readonly, draining, maintenance."""

import itertools
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from common import catalog
from memshard.v1 import memory_pb2 as pb
from router.place import home_slot
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@dataclass
class Shards:
    """A cluster of two, whose statuses change."""

    cluster: LocalCluster
    api: "MemoryServiceAsyncStub"

    async def set_status(self, shard_id: str, status: str) -> None:
        async with database(self.cluster.catalog_dsn(owner=True)) as connection, connection.transaction():
            await connection.execute("UPDATE shards SET status = $2 WHERE shard_id = $1", shard_id, status)
            epoch = await connection.fetchval("UPDATE topology SET epoch = epoch + 1 RETURNING epoch")
            await connection.execute("SELECT pg_notify($1, $2)", catalog.CHANNEL, str(epoch))
        await eventually(lambda: f'"epoch": {epoch}, "shards": 2, "event": "topology changed"' in self.cluster.logs())


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shards() -> AsyncIterator[Shards]:
    async with LocalCluster(shards=2) as cluster, memory_service(cluster.address) as api:
        yield Shards(cluster, api)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def placed_by_content() -> AsyncIterator[Shards]:
    async with (
        LocalCluster(shards=2, options=["--placement", "content_hash"]) as cluster,
        memory_service(cluster.address) as api,
    ):
        yield Shards(cluster, api)


@pytest_asyncio.fixture(loop_scope="session")
async def shard_id(shards: Shards, user: str) -> AsyncIterator[str]:
    """The shard of the test's user, active again afterwards."""
    owner = (await topology_of(shards.cluster.catalog_dsn())).owner(user_slot(user))
    await shards.api.StoreMemory(store_request(user, "stored before"))
    yield owner.shard_id
    await shards.set_status(owner.shard_id, "active")


async def test_a_readonly_shard_is_read_and_refuses_writes(shards: Shards, shard_id: str, user: str) -> None:
    await shards.set_status(shard_id, "readonly")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shards.api.StoreMemory(store_request(user, "not now"))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "READ_ONLY")
    batch = pb.BatchStoreMemoriesRequest(memories=[pb.Memory(user_id=user, content="nor so")])
    (result,) = (await shards.api.BatchStoreMemories(batch)).results
    assert result.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    listed = await shards.api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert [memory.content for memory in listed.memories] == ["stored before"]


async def test_a_draining_shard_serves_on(shards: Shards, shard_id: str, user: str) -> None:
    await shards.set_status(shard_id, "draining")
    await shards.api.StoreMemory(store_request(user, "still taken"))
    listed = await shards.api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    assert len(listed.memories) == 2


async def test_a_shard_in_maintenance_is_not_asked_and_named_as_missing(
    shards: Shards, shard_id: str, user: str
) -> None:
    await shards.set_status(shard_id, "maintenance")
    for call in (
        shards.api.StoreMemory(store_request(user, "not now")),
        shards.api.ListMemories(pb.ListMemoriesRequest(user_id=user)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert (refused.value.code(), reason_of(refused.value)) == (
            grpc.StatusCode.UNAVAILABLE,
            "SHARD_MAINTENANCE",
        )
    found = await shards.api.SearchMemories(pb.SearchMemoriesRequest(query="stored"))
    assert [failure.shard_id for failure in found.report.shards.failed] == [shard_id]


async def test_a_request_that_a_readonly_shard_refuses_leaves_its_request_id_free(
    placed_by_content: Shards, user: str
) -> None:
    """The id is taken on one shard, and the effect would have been on the other."""
    topology = await topology_of(placed_by_content.cluster.catalog_dsn())
    here = topology.owner(user_slot(user)).shard_id
    other = next(shard.shard_id for shard in topology.shards if shard.shard_id != here)
    ids = (str(uuid.uuid4()) for _ in itertools.count())
    away = next(id for id in ids if topology.owner(home_slot(user, id)).shard_id == other)
    refused_request = pb.DeleteMemoryRequest(id=away, user_id=user, request_id="r")
    await placed_by_content.set_status(other, "readonly")
    try:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await placed_by_content.api.DeleteMemory(refused_request)
    finally:
        await placed_by_content.set_status(other, "active")
    assert reason_of(refused.value) == "READ_ONLY"
    another = pb.DeleteMemoryRequest(id=next(ids), user_id=user, request_id="r")
    assert not (await placed_by_content.api.DeleteMemory(another)).deleted
    with pytest.raises(grpc.aio.AioRpcError) as reused:
        await placed_by_content.api.DeleteMemory(refused_request)
    assert reason_of(reused.value) == "REQUEST_ID_REUSED"
