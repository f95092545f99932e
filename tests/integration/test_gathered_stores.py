"""Stores that come together share a statement; each caller has its own outcome, and nobody pays for another."""

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

import grpc
import pytest

from memshard.v1 import memory_pb2 as pb
from shard.moving import ownership, side
from shard.moving.ownership import FenceError
from tests.integration.test_ownership import Place, held_fence, place, somebody_waits_for_a_lock
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.wire import database, reason_of, shard_service, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

__all__ = ["place"]

_MANY = 120
# At the same time: as many as no limit refuses.
_TEAM = 30
# Users of one shard, and how many of them store at the same time, again and again.
_OTHERS, _AT_WORK = 40, 8
# What a fence may hold up others for at a time (shard/moving/ownership.py), and what the machine may take besides.
_LONGEST_WAIT_S, _SLACK_S = 0.5, 3.0
_MOVE_ID = 4711
_STATE = "SELECT state FROM owned_slots WHERE slot = $1"
_FORGET_MARKS = "DELETE FROM move_marks WHERE move_id = $1"


def _id() -> str:
    return str(uuid.uuid4())


async def _transactions(cluster: LocalCluster, user: str) -> tuple[int, int]:
    """How many memories a user has, and how many transactions stored them."""
    topology = await topology_of(cluster.catalog_dsn())
    shard = topology.owner(user_slot(user))
    async with database(cluster.shard_dsn(shard.shard_id, owner=True)) as connection:
        row = await connection.fetchrow(
            "SELECT count(*) AS rows, count(DISTINCT xmin::text) AS transactions FROM memories WHERE user_id = $1", user
        )
    assert row is not None
    return row["rows"], row["transactions"]


async def _total(cluster: LocalCluster, family: str, suffix: str = "_total") -> float:
    """What all shards together have counted."""
    families = [await families_of(cluster, shard) for shard in ("shard-0", "shard-1", "shard-2")]
    return sum(
        sample.value for found in families for sample in found[family].samples if sample.name == f"{family}{suffix}"
    )


async def _acknowledged(cluster: LocalCluster) -> float:
    """How many writes the shards have acknowledged."""
    return await _total(cluster, "memory_writes_acknowledged")


async def _shared(cluster: LocalCluster) -> tuple[float, float]:
    """How many stores there were, and how many statements fewer."""
    stores, statements = [await _total(cluster, "memory_stores_gathered", suffix) for suffix in ("_sum", "_count")]
    return stores, stores - statements


async def test_stores_that_come_together_share_transactions(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    requests = [store_request(user, f"memory {number}", _id()) for number in range(_MANY)]
    before, stores, shared = await _acknowledged(cluster), *await _shared(cluster)
    turns = asyncio.Semaphore(_TEAM)
    shard_id = (await topology_of(cluster.catalog_dsn())).owner(user_slot(user)).shard_id

    async def store(request: pb.StoreMemoryRequest) -> pb.StoreMemoryResponse:
        async with turns:
            return await api.StoreMemory(request)

    async def have_come() -> bool:
        family = (await families_of(cluster, shard_id))["memory_operations_in_flight"]
        return any(one.labels["operation"] == "Store" and one.value >= _TEAM for one in family.samples)

    # However busy the machine is, they come while others are under way.
    async with database(cluster.shard_dsn(shard_id, owner=True)) as holder, holder.transaction():
        await holder.execute("LOCK TABLE memories IN SHARE MODE")
        under_way = [asyncio.ensure_future(store(request)) for request in requests]
        await eventually(have_come, within_s=4)
    answers = await asyncio.gather(*under_way)
    # Each is counted, however many share a commit; what the health monitor stores comes on top.
    assert await _acknowledged(cluster) >= before + _MANY
    stores_now, shared_now = await _shared(cluster)
    assert stores_now >= stores + _MANY
    assert shared_now > shared + _TEAM / 2
    for request, answer in zip(requests, answers, strict=True):
        assert (answer.memory.id, answer.memory.content) == (request.memory.id, request.memory.content)
        assert answer.memory.version == 1
        assert answer.receipt.consistency_token
    rows, transactions = await _transactions(cluster, user)
    assert rows == _MANY
    assert transactions < _MANY - _TEAM / 2
    # What each was told is what is there.
    for answer in answers[:5]:
        found = await api.GetMemory(pb.GetMemoryRequest(id=answer.memory.id, user_id=user))
        assert found.memory == answer.memory


async def test_a_store_by_itself_is_a_transaction_by_itself(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    for number in range(3):
        await api.StoreMemory(store_request(user, f"memory {number}", _id()))
    assert await _transactions(cluster, user) == (3, 3)


async def test_of_a_crowd_each_hears_what_became_of_its_own(api: "MemoryServiceAsyncStub", user: str) -> None:
    taken, repeated = _id(), store_request(user, "the same again", _id())
    await api.StoreMemory(store_request(user, "first", taken))
    first = await api.StoreMemory(repeated)
    deleted = store_request(user, "gone", _id())
    await api.StoreMemory(deleted)
    await api.DeleteMemory(pb.DeleteMemoryRequest(id=deleted.memory.id, user_id=user))
    twice = store_request(user, "twice in one crowd", _id())
    late = store_request(user, "too late", _id())
    late.memory.expire_time.FromSeconds(1_000_000_000)
    good = [store_request(user, f"good {number}", _id()) for number in range(40)]
    crowd = [
        *good[:20], store_request(user, "second", taken), repeated, twice, deleted, late, twice, *good[20:]
    ]  # fmt: skip
    outcomes = await asyncio.gather(*(api.StoreMemory(request) for request in crowd), return_exceptions=True)
    refused = {n: reason_of(o) for n, o in enumerate(outcomes) if isinstance(o, grpc.aio.AioRpcError)}
    assert refused.keys() == {20, 24}
    assert refused[20] == "ID_TAKEN"
    answers = [outcome for outcome in outcomes if isinstance(outcome, pb.StoreMemoryResponse)]
    assert outcomes[21].memory == first.memory  # type: ignore[union-attr]  # Neither is an error.
    assert outcomes[22].memory == outcomes[25].memory  # type: ignore[union-attr]
    assert [answer.memory.content for answer in answers if answer.memory.content.startswith("good")] == [
        request.memory.content for request in good
    ]
    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000))
    assert sorted(memory.content for memory in page.memories) == sorted(
        ["first", "the same again", "twice in one crowd", *(request.memory.content for request in good)]
    )


def _others(place: Place) -> list[str]:
    """Users of the same shard, in other slots."""
    found = [
        name
        for name in (f"{place.user_id}-{number}" for number in range(400))
        if place.topology.owner(user_slot(name)).shard_id == place.shard.shard_id and user_slot(name) != place.slot
    ][:_OTHERS]
    assert len(found) == _OTHERS
    return found


async def test_a_slot_whose_state_is_being_changed_holds_nobody_else_up(cluster: LocalCluster, place: Place) -> None:
    """Others of the same shard are stored while it waits, and it hears the outcome in the end. So it is when a fence is
    taken away, or slots change hands; who makes a fence has the whole table (below).
    """
    others = _others(place)
    async with held_fence(place) as fence, shard_service(place.shard.address) as stub:
        waiting = [asyncio.ensure_future(place.store()) for _ in range(6)]
        await somebody_waits_for_a_lock(cluster, place)

        async def store(user: str) -> None:
            await stub.Store(place.request(user), timeout=2)

        async with asyncio.timeout(2.5):
            await asyncio.gather(*(store(user) for user in others))
        assert not any(write.done() for write in waiting)
        await fence.commit()
        refused = await asyncio.gather(*waiting, return_exceptions=True)
    assert [reason_of(one) for one in refused if isinstance(one, grpc.aio.AioRpcError)] == ["WRONG_SHARD"] * 6
    assert await place.rows() == 0


async def test_a_fence_that_has_to_wait_holds_the_shard_up_for_a_bounded_time(
    cluster: LocalCluster, place: Place
) -> None:
    """As a mover makes it, with a write under way that does not end: others go on in between, and when it has ended the
    fence is made, and holds up nobody.
    """
    others, fence_s = _others(place), 6.0
    waited_s: list[float] = []
    dsn, shard_id = cluster.shard_dsn(place.shard.shard_id, owner=True), place.shard.shard_id

    async def store(user: str) -> None:
        began = time.monotonic()
        await place.stub.Store(place.request(user), timeout=10)
        waited_s.append(time.monotonic() - began)

    async def stores(until: "asyncio.Future[None]") -> None:
        async def of_one(user: str) -> None:
            while not until.done():
                await store(user)

        await asyncio.gather(*(of_one(user) for user in others[:_AT_WORK]))

    async with side.opened(shard_id, dsn, _MOVE_ID) as giver, database(dsn) as writer:

        async def fence() -> None:
            await ownership.fence(
                giver, place.slot, place.slot, timeout_s=fence_s, move_id=_MOVE_ID, way="forward", mark=1
            )

        try:
            async with writer.transaction():
                await writer.execute("SELECT FROM owned_slots WHERE slot = $1 FOR SHARE", place.slot)
                began = time.monotonic()
                fencing = asyncio.ensure_future(fence())
                await stores(fencing)
                with pytest.raises(FenceError):
                    await fencing
                assert time.monotonic() - began < fence_s + _SLACK_S
            print(f"{len(waited_s)} stores meanwhile, the slowest took {max(waited_s):.2f} s")
            # They did wait, each for the mover's patience at most: it is the real lock.
            assert _LONGEST_WAIT_S / 2 < max(waited_s) < fence_s / 2
            assert len(waited_s) > 2 * _AT_WORK
            assert await place.database.fetchval(_STATE, place.slot) == "own"
            await fence()
            assert await place.database.fetchval(_STATE, place.slot) == "fenced"
            async with asyncio.timeout(_SLACK_S * 2):
                await asyncio.gather(*(store(user) for user in others))
        finally:
            await ownership.unfence(giver, place.slot, place.slot)
            await giver.connection.execute(_FORGET_MARKS, _MOVE_ID)


async def test_callers_who_leave_take_nothing_from_the_others(api: "MemoryServiceAsyncStub", user: str) -> None:
    requests = [store_request(user, f"memory {number}", _id()) for number in range(60)]
    calls = [api.StoreMemory(request) for request in requests]
    await asyncio.sleep(0.01)  # Some are on their way by then, whichever.
    for call in calls[::3]:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    stayed = [outcome for number, outcome in enumerate(outcomes) if number % 3]
    assert all(isinstance(outcome, pb.StoreMemoryResponse) for outcome in stayed)
    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000))
    there = {memory.id for memory in page.memories}
    assert {request.memory.id for number, request in enumerate(requests) if number % 3} <= there
    # Sent again, those who left hear what became of theirs, each once.
    await asyncio.gather(*(api.StoreMemory(request) for request in requests[::3]))
    page = await api.ListMemories(pb.ListMemoriesRequest(user_id=user, page_size=1000))
    assert sorted(memory.id for memory in page.memories) == sorted(request.memory.id for request in requests)
