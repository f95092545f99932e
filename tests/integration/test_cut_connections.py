"""Every write, repeated after its answer was lost between commit and caller, has had its one effect."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2

from common import catalog
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.proxy import Proxy
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def proxied() -> AsyncIterator[tuple[LocalCluster, Proxy]]:
    """A cluster whose only shard is reached through a proxy."""
    async with LocalCluster(shards=1) as cluster:
        (shard,) = (await topology_of(cluster.catalog_dsn())).shards
        host, port = shard.address.split(":")
        async with Proxy(host, int(port)) as proxy:
            async with database(cluster.catalog_dsn(owner=True)) as connection:
                epoch = await catalog.read_epoch(connection)
                epoch = await catalog.set_addresses(connection, epoch, {shard.shard_id: proxy.address})
            await eventually(lambda: f'"epoch": {epoch}, "shards": 1' in cluster.logs())
            yield cluster, proxy


Write = Callable[["MemoryServiceAsyncStub"], Awaitable[Any]]


async def lost_and_repeated(proxied: tuple[LocalCluster, Proxy], write: Write, effect: str, *arguments: object) -> Any:
    """Sends `write`, waits until the query `effect` sees it committed, cuts its connection, and sends it again."""
    cluster, proxy = proxied
    async with memory_service(cluster.address) as api, database(cluster.shard_dsn("shard-0")) as connection:
        # The channel is there before the answers are held: what is lost is the answer and nothing else.
        await api.ListMemories(pb.ListMemoriesRequest(user_id="somebody"))
        proxy.hold_answers()
        call = asyncio.ensure_future(write(api))
        await eventually(lambda: connection.fetchval(effect, *arguments))
        proxy.cut()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await call
        assert (lost.value.code(), reason_of(lost.value)) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
        return await eventually(lambda: write(api))


async def listed(proxied: tuple[LocalCluster, Proxy], user: str) -> list[str]:
    async with memory_service(proxied[0].address) as api:
        page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
        return [memory.content for memory in page.memories]


async def stored(proxied: tuple[LocalCluster, Proxy], user: str, content: str) -> pb.Memory:
    async with memory_service(proxied[0].address) as api:
        request = store_request(user, content, str(uuid.uuid4()))

        async def store() -> pb.Memory:
            return (await api.StoreMemory(request)).memory

        return await eventually(store)


STORED = "SELECT count(*) > 0 FROM memories WHERE user_id = $1"


async def test_a_store(proxied: tuple[LocalCluster, Proxy], user: str) -> None:
    request = store_request(user, "once", str(uuid.uuid4()))
    answer = await lost_and_repeated(proxied, lambda api: api.StoreMemory(request), STORED, user)
    assert (answer.memory.content, answer.memory.version) == ("once", 1)
    assert await listed(proxied, user) == ["once"]


async def test_an_update(proxied: tuple[LocalCluster, Proxy], user: str) -> None:
    memory = await stored(proxied, user, "before")
    request = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, user_id=user, content="after"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
        expected_version=1,
        request_id="update",
    )
    changed = "SELECT version = 2 FROM memories WHERE user_id = $1"
    answer = await lost_and_repeated(proxied, lambda api: api.UpdateMemory(request), changed, user)
    assert (answer.memory.content, answer.memory.version) == ("after", 2)
    assert await listed(proxied, user) == ["after"]


async def test_a_delete(proxied: tuple[LocalCluster, Proxy], user: str) -> None:
    memory = await stored(proxied, user, "deleted")
    request = pb.DeleteMemoryRequest(id=memory.id, user_id=user, request_id="delete")
    deleted = "SELECT deleted_at IS NOT NULL FROM memories WHERE user_id = $1"
    answer = await lost_and_repeated(proxied, lambda api: api.DeleteMemory(request), deleted, user)
    assert answer.deleted
    assert await listed(proxied, user) == []


async def test_a_batch(proxied: tuple[LocalCluster, Proxy], user: str) -> None:
    memories = [pb.Memory(id=str(uuid.uuid4()), user_id=user, content=f"item {n}") for n in range(20)]
    request = pb.BatchStoreMemoriesRequest(memories=memories)

    async def write(api: "MemoryServiceAsyncStub") -> pb.BatchStoreMemoriesResponse:
        answer = await api.BatchStoreMemories(request)
        errors = {result.error.code for result in answer.results if result.HasField("error")}
        if errors:
            # Each item tells for itself that its fate is unknown.
            assert errors == {grpc.StatusCode.UNAVAILABLE.value[0]}
            assert len({result.error.message for result in answer.results}) == 1
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(("grpc-status-details-bin", answer.results[0].error.SerializeToString())),
                answer.results[0].error.message,
            )
        return answer

    answer = await lost_and_repeated(proxied, write, STORED, user)
    assert [result.id for result in answer.results] == [memory.id for memory in memories]
    assert sorted(await listed(proxied, user)) == sorted(memory.content for memory in memories)


async def test_an_erasure(proxied: tuple[LocalCluster, Proxy], user: str) -> None:
    for n in range(3):
        await stored(proxied, user, f"memory {n}")
    request = pb.EraseUserRequest(user_id=user, request_id="erase")
    erased = "SELECT count(*) = 0 FROM memories WHERE user_id = $1"
    answer = await lost_and_repeated(proxied, lambda api: api.EraseUser(request), erased, user)
    assert answer.memories_erased == 3
