"""Every write whose answer was lost between commit and caller has its one effect, whoever repeats it.

Each is lost twice: the connection is cut for a moment, when the router repeats it, and for as long as the router tries,
when the caller has to.
"""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2

from common import catalog
from common.breaker_settings import SHARD
from common.slots import slot_of
from memshard.v1 import memory_pb2 as pb
from router.place import home_slot
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.proxy import Proxy
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@dataclass(frozen=True)
class There:
    """A cluster whose only shard is reached through a proxy, and for how long that is cut."""

    cluster: LocalCluster
    proxy: Proxy
    lasting: bool = False

    def cut(self) -> None:
        """Loses what is under way, and, if it lasts, whatever is tried until `accept`."""
        if self.lasting:
            self.proxy.refuse()
        else:
            self.proxy.cut()

    async def heal(self) -> None:
        """Ends it, and has the breaker closed again: a half-open one would not let a call be repeated."""
        self.proxy.accept()
        async with memory_service(self.cluster.address) as api:
            for _ in range(SHARD.probes):
                request = store_request("somebody", "a probe", str(uuid.uuid4()))
                await eventually(lambda: api.StoreMemory(request))  # noqa: B023  # Awaited in the same round.


@asynccontextmanager
async def behind_a_proxy(*options: str) -> AsyncIterator[There]:
    """A cluster whose only shard is reached through a proxy."""
    async with LocalCluster(shards=1, options=options) as cluster:
        (shard,) = (await topology_of(cluster.catalog_dsn())).shards
        host, port = shard.address.split(":")
        async with Proxy(host, int(port)) as proxy:
            async with database(cluster.catalog_dsn(owner=True)) as connection:
                epoch = await catalog.read_epoch(connection)
                epoch = await catalog.set_addresses(connection, epoch, {shard.shard_id: proxy.address})
            await eventually(lambda: f'"epoch": {epoch}, "shards": 1' in cluster.logs())
            yield There(cluster, proxy)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def of_users() -> AsyncIterator[There]:
    async with behind_a_proxy() as there:
        yield there


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def of_contents() -> AsyncIterator[There]:
    """With memories placed by content: a change of one is several calls to shards."""
    async with behind_a_proxy("--placement", "content_hash") as there:
        yield there


@pytest.fixture(params=["for a moment", "for long"])
def lasting(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "for long")


@pytest.fixture
def proxied(of_users: There, lasting: bool) -> There:
    return replace(of_users, lasting=lasting)


@pytest.fixture
def by_content(of_contents: There, lasting: bool) -> There:
    return replace(of_contents, lasting=lasting)


Write = Callable[["MemoryServiceAsyncStub"], Awaitable[Any]]


async def lost_and_repeated(there: There, write: Write, effect: str, *arguments: object) -> Any:
    """Sends `write`, waits until the query `effect` sees it committed, cuts its connection, and sends it again."""
    cluster = there.cluster
    async with memory_service(cluster.address) as api, database(cluster.shard_dsn("shard-0")) as connection:
        # The channel is there before the answers are held: what is lost is the answer and nothing else.
        await api.ListMemories(pb.ListMemoriesRequest(user_id="somebody"))
        there.proxy.hold_answers()
        call = asyncio.ensure_future(write(api))
        await eventually(lambda: connection.fetchval(effect, *arguments))
        there.cut()
        await check(there, (await asyncio.gather(call, return_exceptions=True))[0])
        return await eventually(lambda: write(api))


async def check(there: There, first: Any) -> None:
    """The first answer was the router's, who had asked again, or none that says what became of the write."""
    await there.heal()
    if there.lasting:
        assert isinstance(first, grpc.aio.AioRpcError)
        assert (first.code(), reason_of(first)) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
    else:
        assert not isinstance(first, BaseException)


async def lost_in(there: There, write: Write, slot: int, effect: str, *arguments: object) -> Any:
    """Sends `write`, and cuts its connection when its step in `slot` is committed; the call that nobody answers to.

    `effect` is a query that sees the step's commit.
    """
    cluster = there.cluster
    async with (
        memory_service(cluster.address) as api,
        database(cluster.shard_dsn("shard-0", owner=True)) as holder,
        database(cluster.shard_dsn("shard-0")) as connection,
    ):
        await eventually(lambda: api.ListMemories(pb.ListMemoriesRequest(user_id="somebody")))
        # Every step waits for its slot: so the answers of those before it come through.
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("UPDATE owned_slots SET held = held WHERE slot = $1", slot)
        call = asyncio.ensure_future(write(api))
        await eventually(lambda: connection.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
        assert not await connection.fetchval(effect, *arguments)
        there.proxy.hold_answers()
        await transaction.rollback()
        await eventually(lambda: connection.fetchval(effect, *arguments))
        there.cut()
        return (await asyncio.gather(call, return_exceptions=True))[0]


async def in_doubt_and_repeated(there: There, write: Write, slot: int, effect: str, *arguments: object) -> Any:
    await check(there, await lost_in(there, write, slot, effect, *arguments))
    async with memory_service(there.cluster.address) as api:
        return await eventually(lambda: write(api))


async def listed(proxied: There, user: str) -> list[str]:
    async with memory_service(proxied.cluster.address) as api:
        page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
        return [memory.content for memory in page.memories]


async def stored(proxied: There, user: str, content: str, memory_id: str = "") -> pb.Memory:
    async with memory_service(proxied.cluster.address) as api:
        request = store_request(user, content, memory_id or str(uuid.uuid4()))

        async def store() -> pb.Memory:
            return (await api.StoreMemory(request)).memory

        return await eventually(store)


STORED = "SELECT count(*) > 0 FROM memories WHERE user_id = $1"


async def test_a_store(proxied: There, user: str) -> None:
    request = store_request(user, "once", str(uuid.uuid4()))
    answer = await lost_and_repeated(proxied, lambda api: api.StoreMemory(request), STORED, user)
    assert (answer.memory.content, answer.memory.version) == ("once", 1)
    assert await listed(proxied, user) == ["once"]


async def test_an_update(proxied: There, user: str) -> None:
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


async def test_a_delete(proxied: There, user: str) -> None:
    memory = await stored(proxied, user, "deleted")
    request = pb.DeleteMemoryRequest(id=memory.id, user_id=user, request_id="delete")
    deleted = "SELECT deleted_at IS NOT NULL FROM memories WHERE user_id = $1"
    answer = await lost_and_repeated(proxied, lambda api: api.DeleteMemory(request), deleted, user)
    assert answer.deleted
    assert await listed(proxied, user) == []


async def test_a_batch(proxied: There, user: str) -> None:
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


async def test_an_erasure(proxied: There, user: str) -> None:
    for n in range(3):
        await stored(proxied, user, f"memory {n}")
    request = pb.EraseUserRequest(user_id=user, request_id="erase")
    erased = "SELECT count(*) = 0 FROM memories WHERE user_id = $1"
    answer = await lost_and_repeated(proxied, lambda api: api.EraseUser(request), erased, user)
    assert answer.memories_erased == 3


# What follows is with memories placed by content: the request id is taken in one slot, and the effect is in another.

TAKEN = "SELECT count(*) = 1 FROM request_claims WHERE user_id = $1"
CHANGED = "SELECT version = 2 FROM memories WHERE user_id = $1"
DELETED = "SELECT deleted_at IS NOT NULL FROM memories WHERE user_id = $1"


def slot_of_content(content: str) -> int:
    return slot_of(hashlib.sha256(content.encode()).digest())


async def is_reused(there: There, user: str) -> bool:
    """Whether the request id is refused for another request."""
    another = pb.DeleteMemoryRequest(id=str(uuid.uuid4()), user_id=user, request_id="r")
    async with memory_service(there.cluster.address) as api:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await api.DeleteMemory(another)
    return reason_of(refused.value) == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("step", ["taking the request id", "the update"])
async def test_an_update_in_two_steps(by_content: There, user: str, step: str) -> None:
    memory = await stored(by_content, user, f"before {user}")
    request = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=memory.id, user_id=user, content="after"),
        update_mask=field_mask_pb2.FieldMask(paths=["content"]),
        expected_version=1,
        request_id="r",
    )
    where = (user_slot(user), TAKEN) if step != "the update" else (slot_of_content(memory.content), CHANGED)
    answer = await in_doubt_and_repeated(by_content, lambda api: api.UpdateMemory(request), *where, user)
    assert (answer.memory.content, answer.memory.version) == ("after", 2)
    assert await listed(by_content, user) == ["after"]
    assert await is_reused(by_content, user)
    async with memory_service(by_content.cluster.address) as api:
        assert (await api.UpdateMemory(request)).memory.version == 2


@pytest.mark.parametrize("step", ["taking the request id", "the delete"])
async def test_a_delete_in_two_steps(by_content: There, user: str, step: str) -> None:
    memory = await stored(by_content, user, f"deleted {user}")
    request = pb.DeleteMemoryRequest(id=memory.id, user_id=user, request_id="r")
    where = (user_slot(user), TAKEN) if step != "the delete" else (slot_of_content(memory.content), DELETED)
    answer = await in_doubt_and_repeated(by_content, lambda api: api.DeleteMemory(request), *where, user)
    assert answer.deleted
    assert await listed(by_content, user) == []
    assert await is_reused(by_content, user)


@pytest.mark.parametrize("step", ["claiming", "storing"])
async def test_a_store_in_two_steps(by_content: There, user: str, step: str) -> None:
    request = store_request(user, f"once {user}", str(uuid.uuid4()))
    claimed = "SELECT count(*) = 1 FROM claims WHERE user_id = $1"
    where = (
        (home_slot(user, request.memory.id), claimed)
        if step == "claiming"
        else (slot_of_content(request.memory.content), STORED)
    )
    answer = await in_doubt_and_repeated(by_content, lambda api: api.StoreMemory(request), *where, user)
    assert (answer.memory.content, answer.memory.version) == (request.memory.content, 1)
    assert await listed(by_content, user) == [request.memory.content]


@pytest.mark.parametrize("placement", ["user_based", "content_hash"])
async def test_a_batch_half_of_which_was_stored_before_and_one_item_of_which_conflicts(
    proxied: There, by_content: There, user: str, placement: str
) -> None:
    there = proxied if placement == "user_based" else by_content
    memories = [pb.Memory(id=str(uuid.uuid4()), user_id=user, content=f"item {n} of {user}") for n in range(20)]
    for memory in memories[::2]:
        await stored(there, user, memory.content, memory.id)
    conflict = pb.Memory(id=memories[0].id, user_id=user, content="not item 0")
    request = pb.BatchStoreMemoriesRequest(memories=[*memories, conflict])
    slot = user_slot(user) if placement == "user_based" else slot_of_content(memories[1].content)
    all_there = "SELECT count(*) = 20 FROM memories WHERE user_id = $1"
    lost = await lost_in(there, lambda api: api.BatchStoreMemories(request), slot, all_there, user)
    unavailable, taken = grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.ALREADY_EXISTS.value[0]
    await there.heal()
    # With placement by content the conflict is found before anything is stored.
    of_conflict = unavailable if placement == "user_based" and there.lasting else taken
    of_the_others = unavailable if there.lasting else grpc.StatusCode.OK.value[0]
    assert [result.error.code for result in lost.results] == [of_the_others] * 20 + [of_conflict]
    async with memory_service(there.cluster.address) as api:

        async def settled() -> list[str] | None:
            results = (await api.BatchStoreMemories(request)).results
            if any(result.error.code == unavailable for result in results):
                return None
            assert results[-1].error.code == taken
            return [result.id for result in results[:-1]]

        assert await eventually(settled) == [memory.id for memory in memories]
    assert sorted(await listed(there, user)) == sorted(memory.content for memory in memories)
