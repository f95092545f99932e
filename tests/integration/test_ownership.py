"""Ownership is checked with each write, and a write that waits for a fence sees it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg
import grpc
import pytest
import pytest_asyncio

from common.deadline import Deadline
from common.errors import InvalidArgument, Unavailable
from common.topology import Shard, Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2
from shard.database import Database
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database, pool_of_one, reason_of, route, shard_service, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub

DIMENSIONS = 256

# What the shard must not do: ask in the statement's own snapshot. It waits for the fence, then still sees "own".
NAIVE_INSERT = """
WITH lock AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared($1)),
     here AS MATERIALIZED (SELECT 1 FROM lock WHERE EXISTS (SELECT FROM owned_slots WHERE slot = $1 AND state = 'own'))
INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                      embedding_model)
SELECT $1, $2, $3, '', '', '', 1, 0.5, 'x', '{}', '' FROM here
"""


@dataclass
class Place:
    """One user's slot on its shard, and the shard's database."""

    user_id: str
    slot: int
    shard: Shard
    topology: Topology
    stub: "ShardServiceAsyncStub"
    database: "asyncpg.Connection[asyncpg.Record]"

    def store(self, content: str = "fenced or not", **call: float) -> "grpc.aio.UnaryUnaryCall[object, object]":
        return self.stub.Store(self.request(self.user_id, content), **call)  # type: ignore[return-value, arg-type]

    def request(self, user_id: str, content: str = "fenced or not") -> shard_pb2.StoreRequest:
        return shard_pb2.StoreRequest(
            route=route(self.topology, self.shard, user_slot(user_id)),
            memory=memory_pb2.Memory(
                id=str(uuid.uuid4()),
                user_id=user_id,
                content=content,
                type=memory_pb2.MEMORY_TYPE_EPISODIC,
                embedding=[0.1] * DIMENSIONS,
            ),
            digest=b"\0" * 32,
        )

    async def rows(self) -> int:
        count: int = await self.database.fetchval("SELECT count(*) FROM memories WHERE user_id = $1", self.user_id)
        return count

    async def set_state(self, state: str) -> None:
        await self.database.execute("UPDATE owned_slots SET state = $2 WHERE slot = $1", self.slot, state)


@pytest_asyncio.fixture
async def place(cluster: LocalCluster, user: str) -> AsyncIterator[Place]:
    topology = await topology_of(cluster.catalog_dsn())
    slot = user_slot(user)
    shard = topology.owner(slot)
    async with (
        shard_service(shard.address) as stub,
        database(cluster.shard_dsn(shard.shard_id, owner=True)) as connection,
    ):
        found = Place(user, slot, shard, topology, stub, connection)
        yield found
        await found.set_state("own")


@asynccontextmanager
async def held_fence(place: Place, state: str = "fenced") -> AsyncIterator["asyncpg.transaction.Transaction"]:
    """A fence whose transaction is still open; the test commits it or rolls it back."""
    transaction = place.database.transaction()
    await transaction.start()
    await place.set_state(state)
    yield transaction


async def somebody_waits_for_a_lock(cluster: LocalCluster, place: Place) -> None:
    async def waiting() -> bool:
        async with database(cluster.shard_dsn(place.shard.shard_id, owner=True)) as other:
            return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    await eventually(waiting, within_s=10)


async def test_a_write_that_waits_for_a_fence_is_refused_once_the_fence_commits(
    cluster: LocalCluster, place: Place
) -> None:
    async with held_fence(place) as fence:
        write = asyncio.ensure_future(place.store())
        await somebody_waits_for_a_lock(cluster, place)
        await fence.commit()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await write
    assert (refused.value.code(), reason_of(refused.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_SHARD")
    assert await place.rows() == 0


async def test_the_same_race_is_lost_by_a_check_in_the_statements_own_snapshot(
    cluster: LocalCluster, place: Place
) -> None:
    """The control: were the shard to check like this, the test above would be red."""
    async with database(cluster.shard_dsn(place.shard.shard_id, owner=True)) as writer, held_fence(place) as fence:
        await place.database.execute("SELECT pg_advisory_xact_lock($1)", place.slot)
        write = asyncio.ensure_future(writer.execute(NAIVE_INSERT, place.slot, place.user_id, uuid.uuid4()))
        await somebody_waits_for_a_lock(cluster, place)
        await fence.commit()
        await write
    assert await place.rows() == 1


async def test_a_write_that_waits_for_a_fence_succeeds_once_the_fence_rolls_back(
    cluster: LocalCluster, place: Place
) -> None:
    async with held_fence(place) as fence:
        write = asyncio.ensure_future(place.store())
        await somebody_waits_for_a_lock(cluster, place)
        await fence.rollback()
        await write
    assert await place.rows() == 1


async def test_a_deadline_ends_the_callers_wait_but_never_the_commit(cluster: LocalCluster, place: Place) -> None:
    async with held_fence(place) as fence:
        # Above a second, the database has ten for the statement (shard/timed_connection.py).
        write = asyncio.ensure_future(place.store(timeout=1.2))
        await somebody_waits_for_a_lock(cluster, place)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await write
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await place.rows() == 0
        await fence.rollback()

    async def stored() -> bool:
        return await place.rows() == 1

    await eventually(stored, within_s=10)


async def test_writers_waiting_for_one_slot_leave_the_shard_to_everybody_else(
    cluster: LocalCluster, place: Place
) -> None:
    """Callers of a fenced slot give up and come again; their writes wait on, but not on every connection."""
    neighbour = next(slot for slot in range(16384) if slot != place.slot and place.topology.owner(slot) == place.shard)
    listing = shard_pb2.ListRequest(
        route=route(place.topology, place.shard, neighbour), user_id="somebody else", page_size=1
    )
    async with held_fence(place) as fence:
        waiting = [asyncio.ensure_future(place.store(timeout=20)) for _ in range(40)]
        await somebody_waits_for_a_lock(cluster, place)
        for _ in range(10):
            await place.stub.List(listing, timeout=2)
        refused = await asyncio.gather(*waiting, return_exceptions=True)
        # Held longer than the shard lets a write wait: each may be sent again, at once or once the slot is free.
        reasons = {reason_of(error) for error in refused if isinstance(error, grpc.aio.AioRpcError)}
        assert reasons == {"SLOT_BUSY"}
        assert len(refused) == 40
        await fence.rollback()
    assert await place.rows() == 0


async def test_the_serving_role_can_hold_a_slot_but_not_take_it(cluster: LocalCluster, place: Place) -> None:
    async with database(cluster.shard_dsn(place.shard.shard_id)) as serving:
        for statement in (
            "UPDATE owned_slots SET state = 'own'",
            "INSERT INTO owned_slots (slot, state) VALUES (1, 'own')",
            "UPDATE identity SET shard_id = 'other'",
            "DELETE FROM schema_migrations",
            "CREATE TABLE mine (x int)",
            "CREATE TEMPORARY TABLE mine (x int)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await serving.execute(statement)


@pytest.mark.parametrize(
    ("sqlstate", "reason"),
    [
        ("25006", "DATABASE_UNAVAILABLE"),  # a primary that has become read-only
        ("53100", "DATABASE_UNAVAILABLE"),  # disk full
        ("53200", "DATABASE_UNAVAILABLE"),  # out of memory
        ("58030", "DATABASE_UNAVAILABLE"),  # I/O error
        ("40P01", "SLOT_BUSY"),  # deadlock
        ("40001", "DATABASE_UNAVAILABLE"),  # replay on a standby was in the way
        ("55P03", "SLOT_BUSY"),  # a lock that was not had in time
        ("57P01", "OUTCOME_UNKNOWN"),  # shut down meanwhile
        ("22P02", "BAD_VALUE"),  # a value that came past the router's checks
    ],
)
async def test_what_the_database_cannot_do_is_no_bug(cluster: LocalCluster, sqlstate: str, reason: str) -> None:
    deadline = Deadline.after(10)
    async with pool_of_one(cluster.shard_dsn("shard-0")) as pool:
        with pytest.raises((Unavailable, InvalidArgument)) as refused:
            async with (await Database(pool).to_write(deadline)).entered() as connection:
                await connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{sqlstate}'; END $$")
    assert refused.value.reason == reason


async def test_a_fenced_slot_is_read_but_not_written(place: Place) -> None:
    await place.store()
    await place.set_state("fenced")
    listing = shard_pb2.ListRequest(
        route=route(place.topology, place.shard, place.slot), user_id=place.user_id, page_size=10
    )
    assert len((await place.stub.List(listing)).memories) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await place.store("another")
    assert reason_of(refused.value) == "WRONG_SHARD"


@pytest.mark.parametrize("rpc", ["Get", "List", "Search"])
async def test_a_slot_that_is_gone_is_not_read(place: Place, rpc: str) -> None:
    await place.store()
    await place.set_state("gone")
    here = route(place.topology, place.shard, place.slot)
    requests = {
        "Get": shard_pb2.GetRequest(route=here, id=str(uuid.uuid4()), user_id=place.user_id),
        "List": shard_pb2.ListRequest(route=here, user_id=place.user_id, page_size=10),
        "Search": shard_pb2.SearchRequest(route=here, user_id=place.user_id, k=5, embedding=[0.1] * DIMENSIONS),
    }
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(place.stub, rpc)(requests[rpc])
    assert reason_of(refused.value) == "WRONG_SHARD"


@pytest.mark.parametrize("wrong", [shard_pb2.Route(cluster_id=str(uuid.uuid4())), shard_pb2.Route(shard_id="shard-77")])
async def test_a_request_meant_for_another_shard_or_cluster_is_refused(place: Place, wrong: shard_pb2.Route) -> None:
    elsewhere = route(place.topology, place.shard, place.slot)
    elsewhere.MergeFrom(wrong)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await place.stub.List(shard_pb2.ListRequest(route=elsewhere, user_id=place.user_id, page_size=1))
    assert reason_of(refused.value) == "WRONG_SHARD"


async def test_a_search_over_slots_that_are_not_all_owned_is_refused_as_a_whole(place: Place) -> None:
    """A shard that answered in part would make the fan-out miss rows without a word."""
    ranges = place.topology.ranges_of(place.shard.shard_id)
    request = shard_pb2.SearchRequest(route=route(place.topology, place.shard, 0), k=5, embedding=[0.1] * DIMENSIONS)
    del request.route.ranges[:]
    request.route.ranges.extend(shard_pb2.SlotRange(first=first, last=last) for first, last in ranges)
    await place.stub.Search(request)
    await place.set_state("gone")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await place.stub.Search(request)
    assert reason_of(refused.value) == "WRONG_SHARD"
