"""A router that is behind finds out, refreshes once, and tries once more; without the catalog it serves on."""

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest
import pytest_asyncio

from common import catalog
from common.topology import Shard
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster, free_port
from tests.support.eventually import eventually
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def moving() -> AsyncIterator[LocalCluster]:
    """A cluster of this module's own: its slots change hands."""
    async with LocalCluster(shards=2) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def moving_api(moving: LocalCluster) -> "AsyncIterator[MemoryServiceAsyncStub]":
    async with memory_service(moving.address) as stub:
        yield stub


async def move(cluster: LocalCluster, slot: int, *, notify: bool) -> tuple[Shard, Shard]:
    """Gives an empty slot to the other shard, in both shards and then in the catalog; returns (from, to)."""
    topology = await topology_of(cluster.catalog_dsn())
    source = topology.owner(slot)
    target = next(shard for shard in topology.shards if shard != source)
    async with database(cluster.shard_dsn(source.shard_id, owner=True)) as connection:
        await connection.execute("UPDATE owned_slots SET state = 'gone' WHERE slot = $1", slot)
        await connection.execute("UPDATE identity SET epoch = $1", topology.epoch + 1)
    async with database(cluster.shard_dsn(target.shard_id, owner=True)) as connection:
        await connection.execute("INSERT INTO owned_slots (slot, state) VALUES ($1, 'own')", slot)
        await connection.execute("UPDATE identity SET epoch = $1", topology.epoch + 1)
    async with database(cluster.catalog_dsn(owner=True)) as connection, connection.transaction():
        found = await connection.fetchrow("SELECT * FROM slot_ranges WHERE $1 BETWEEN first AND last", slot)
        assert found is not None
        await connection.execute("DELETE FROM slot_ranges WHERE first = $1", found["first"])
        for first, last, shard_id in (
            (found["first"], slot - 1, source.shard_id),
            (slot, slot, target.shard_id),
            (slot + 1, found["last"], source.shard_id),
        ):
            if first <= last:
                await connection.execute("INSERT INTO slot_ranges VALUES ($1, $2, $3)", first, last, shard_id)
        await connection.execute("UPDATE topology SET epoch = epoch + 1")
        if notify:
            await connection.execute("SELECT pg_notify($1, $2)", catalog.CHANNEL, str(topology.epoch + 1))
    return source, target


async def count_rows(cluster: LocalCluster, shard: Shard, user: str) -> int:
    async with database(cluster.shard_dsn(shard.shard_id)) as connection:
        count: int = await connection.fetchval("SELECT count(*) FROM memories WHERE user_id = $1", user)
        return count


async def test_a_stale_router_refreshes_once_and_the_caller_notices_nothing(
    moving: LocalCluster, moving_api: "MemoryServiceAsyncStub", user: str
) -> None:
    source, target = await move(moving, user_slot(user), notify=False)
    stored = await moving_api.StoreMemory(store_request(user, "written after the move"))
    assert (await count_rows(moving, source, user), await count_rows(moving, target, user)) == (0, 1)
    got = await moving_api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id))
    assert got.memory.user_id == user


async def test_a_stale_router_refreshes_for_a_fan_out_too(
    moving: LocalCluster, moving_api: "MemoryServiceAsyncStub", user: str
) -> None:
    await moving_api.StoreMemory(store_request(user, "a purple giraffe on roller skates"))
    other = f"user-{uuid.uuid4()}"
    await move(moving, user_slot(other), notify=False)
    found = await moving_api.SearchMemories(
        pb.SearchMemoriesRequest(query="purple giraffe roller skates", limit=1, require_all_shards=True)
    )
    assert found.results[0].memory.user_id == user
    assert (found.report.shards.total, found.report.shards.succeeded) == (2, 2)


async def test_a_notification_reaches_the_router_without_a_request(moving: LocalCluster, user: str) -> None:
    await move(moving, user_slot(user), notify=True)
    epoch = (await topology_of(moving.catalog_dsn())).epoch
    # Well below the five seconds of the poll.
    await eventually(lambda: f'"epoch": {epoch}, "shards": 2, "event": "topology changed"' in moving.logs(), within_s=4)


async def test_polling_finds_what_no_notification_told(moving: LocalCluster, user: str) -> None:
    await move(moving, user_slot(user), notify=False)
    epoch = (await topology_of(moving.catalog_dsn())).epoch
    await eventually(
        lambda: f'"epoch": {epoch}, "shards": 2, "event": "topology changed"' in moving.logs(), within_s=15
    )


async def test_a_shard_and_a_catalog_that_disagree_are_unavailable_not_wrong(
    moving: LocalCluster, moving_api: "MemoryServiceAsyncStub", user: str
) -> None:
    topology = await topology_of(moving.catalog_dsn())
    owner = topology.owner(user_slot(user))
    async with database(moving.shard_dsn(owner.shard_id, owner=True)) as connection:
        await connection.execute("UPDATE owned_slots SET state = 'gone' WHERE slot = $1", user_slot(user))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await moving_api.StoreMemory(store_request(user, "nowhere to go"))
        await connection.execute("UPDATE owned_slots SET state = 'own' WHERE slot = $1", user_slot(user))
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.UNAVAILABLE, "TOPOLOGY_CHANGING")


async def test_calls_in_flight_when_a_shard_changes_its_address_are_answered_and_never_dropped(
    moving: LocalCluster, moving_api: "MemoryServiceAsyncStub", user: str
) -> None:
    """Closing the old channel must not make the shard vanish from an answer, nor leave a caller without one."""
    topology = await topology_of(moving.catalog_dsn())
    owner = topology.owner(user_slot(user))
    stored = await moving_api.StoreMemory(store_request(user, "on a shard that moves house"))
    search = pb.SearchMemoriesRequest(query="moves house", require_all_shards=True)

    async def set_address(address: str) -> int:
        async with database(moving.catalog_dsn(owner=True)) as connection:
            return await catalog.set_addresses(
                connection, await catalog.read_epoch(connection), {owner.shard_id: address}
            )

    with frozen(moving.pid(f"postgres-{owner.shard_id}")):
        calls = [
            asyncio.ensure_future(moving_api.SearchMemories(search, timeout=2)),
            asyncio.ensure_future(moving_api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=2)),
            asyncio.ensure_future(moving_api.StoreMemory(store_request(user, "meanwhile"), timeout=2)),
        ]
        await asyncio.wait(calls, timeout=0.5)
        epoch = await set_address(f"127.0.0.1:{free_port()}")
        await eventually(
            lambda: f'"epoch": {epoch}, "shards": 2, "event": "topology changed"' in moving.logs(), within_s=10
        )
        with pytest.raises(grpc.aio.AioRpcError) as nobody:
            await moving_api.GetMemory(pb.GetMemoryRequest(id=str(uuid.uuid4())), timeout=5)
        assert nobody.value.code() is grpc.StatusCode.UNAVAILABLE
        await set_address(owner.address)
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=10)
    for outcome in outcomes:
        if isinstance(outcome, grpc.aio.AioRpcError):
            assert outcome.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        elif isinstance(outcome, pb.SearchMemoriesResponse):
            assert outcome.report.shards.succeeded == 2
    await eventually(lambda: moving_api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id)), within_s=10)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A PostgreSQL that neither answers nor refuses: its postmaster and all backends are stopped."""
    postmaster = psutil.Process(pid)
    stopped = [postmaster, *postmaster.children(recursive=True)]
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            os.kill(process.pid, signal.SIGCONT)


async def test_a_router_with_a_snapshot_serves_on_while_the_catalog_is_down(
    moving: LocalCluster, moving_api: "MemoryServiceAsyncStub", user: str
) -> None:
    async def everything_works() -> None:
        stored = await moving_api.StoreMemory(store_request(user, "stored without a catalog"), timeout=8)
        await moving_api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id), timeout=8)
        found = await moving_api.SearchMemories(pb.SearchMemoriesRequest(query="catalog"), timeout=8)
        assert not found.report.shards.failed
        listed = await moving_api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=8)
        assert stored.memory.id in {memory.id for memory in listed.memories}

    router = moving.pid("router-0")
    with frozen(moving.pid("postgres-catalog")):
        await everything_works()
        warned = moving.logs().count("serving from the snapshot")
        # The router has looked, in vain, and still serves.
        await eventually(lambda: moving.logs().count("serving from the snapshot") > warned, within_s=15)
        await everything_works()
    # Several times, as the connection dies in another state each time.
    killed: set[int] = set()
    for _ in range(5):
        killed.add(moving.kill("postgres-catalog", signal.SIGKILL))
        await everything_works()
        await eventually(lambda: moving.pid("postgres-catalog") not in killed, within_s=20)
        await eventually(moving.healthy, within_s=20)
    assert moving.pid("router-0") == router


async def test_a_catalog_that_is_away_is_not_hammered(
    moving: LocalCluster, moving_api: "MemoryServiceAsyncStub", user: str
) -> None:
    """Not even by stale requests, each of which wishes for a newer topology."""
    owner = (await topology_of(moving.catalog_dsn())).owner(user_slot(user))
    async with database(moving.shard_dsn(owner.shard_id, owner=True)) as connection:
        await connection.execute("UPDATE owned_slots SET state = 'gone' WHERE slot = $1", user_slot(user))
        with frozen(moving.pid("postgres-catalog")):
            before = moving.logs().count("serving from the snapshot")
            for _ in range(20):
                with pytest.raises(grpc.aio.AioRpcError):
                    await moving_api.StoreMemory(store_request(user, "stale"), timeout=0.3)
            after = moving.logs().count("serving from the snapshot")
        await connection.execute("UPDATE owned_slots SET state = 'own' WHERE slot = $1", user_slot(user))
    # Twenty requests over six seconds, and a shortest pause of 0.2 s.
    assert after - before <= 31
    epoch = (await topology_of(moving.catalog_dsn())).epoch
    await move(moving, user_slot(f"user-{uuid.uuid4()}"), notify=True)
    await eventually(
        lambda: f'"epoch": {epoch + 1}, "shards": 2, "event": "topology changed"' in moving.logs(), within_s=15
    )
