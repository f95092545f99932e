"""Slots move while something else fails: a router that the catalog cannot reach, a primary that is replaced."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from common.moves import WAY_BACK_CLOSED, Step
from common.probe_user import PREFIX
from local.cluster import CATALOG_SERVER
from memshard import AsyncMemoryClient, NotFound, ReadLevel
from tests.support.cluster import LocalCluster
from tests.support.end_state import check_everything, wrong
from tests.support.eventually import eventually
from tests.support.faulty import faulty_cluster
from tests.support.moving import MoverProcess, Slots
from tests.support.proxy import Fault
from tests.support.replay import replay_paused
from tests.support.wire import database, user_slot
from tests.support.writers import Writers

_USERS = [f"met-{number}" for number in range(40)]


async def test_a_router_without_the_catalog_follows_the_slots() -> None:
    """The shards tell it where they went. It writes to nobody who gave them away, and sees what others write."""
    async with faulty_cluster(shards=2, replicas=1, embedder="local", dimensions=256) as faulty:
        slots = Slots(faulty.cluster, {"rollback_window_s": 0, "max_slots": 4096})
        stale = Writers(faulty.address, _USERS[:20])
        fresh = Writers(faulty.cluster.address, _USERS[20:])
        async with asyncio.TaskGroup() as group:
            for writers in (stale, fresh):
                group.create_task(writers.run(2))
            try:
                await asyncio.sleep(1)
                await faulty.proxies.inflict(Fault.RESET, CATALOG_SERVER)
                await slots.move("drain", "--shard", "shard-1")
                written = len(stale.writes.times)
                await asyncio.sleep(2)
            finally:
                stale.stop()
                fresh.stop()
        assert len(stale.writes.times) > written, "it came to a halt"
        assert (stale.failures, stale.wrong, fresh.failures, fresh.wrong) == ([], [], [], [])
        # Each sees what the other wrote.
        stale.address, fresh.address = fresh.address, stale.address
        assert await stale.found() == stale.expected
        assert await fresh.found() == fresh.expected
        assert await slots.left_over() == []


async def _is_there(client: AsyncMemoryClient, user: str, memory_id: str, level: ReadLevel) -> bool:
    try:
        await client.get(memory_id, user_id=user, read=level)
    except NotFound:
        return False
    return True


async def _moved(slots: Slots, slot: int, target: str) -> None:
    await slots.move("move", "--first", str(slot), "--last", str(slot), "--to", target)


async def test_a_replica_that_missed_two_moves_gives_no_old_answer_to_who_wrote_in_between() -> None:
    """It believes that its shard never gave the slot away. What was written to the other shard stands for a place in
    this one's log, which the replica has not reached.
    """
    async with LocalCluster(shards=2, replicas=1) as cluster, AsyncMemoryClient(cluster.address) as client:
        slots = Slots(cluster, {"rollback_window_s": 0})
        user = _USERS[0]
        slot = user_slot(user)
        home = (await slots.topology()).owner(slot).shard_id
        other = next(shard.shard_id for shard in (await slots.topology()).shards if shard.shard_id != home)
        await eventually(lambda: cluster.standbys(home) != [])
        async with replay_paused(cluster, home):
            await _moved(slots, slot, other)
            stored = await client.store(user, "written while the slot was away")
            await _moved(slots, slot, home)
            # The replica is asked, and has not got it: or this test says nothing.
            assert not await _is_there(client, user, stored.memory.id, ReadLevel.EVENTUAL)
            assert await _is_there(client, user, stored.memory.id, ReadLevel.SESSION)


async def test_a_router_without_the_catalog_knows_from_a_token_that_it_is_behind() -> None:
    """By its snapshot the slot is where it was, and a replica there that is behind believes the same."""
    async with faulty_cluster(shards=2, replicas=1, embedder="local", dimensions=256) as faulty:
        slots = Slots(faulty.cluster, {"rollback_window_s": 0})
        user = faulty.users("shard-0", 1)[0]
        async with (
            AsyncMemoryClient(faulty.address) as stale,
            AsyncMemoryClient(faulty.cluster.address) as fresh,
            replay_paused(faulty.cluster, "shard-0"),
        ):
            await stale.list_memories(user)
            await faulty.proxies.inflict(Fault.RESET, CATALOG_SERVER)
            await _moved(slots, user_slot(user), "shard-1")
            stored = await fresh.store(user, "written where the slot is now")
            stale.join_session(user, fresh.session_tokens(user))
            assert not await _is_there(stale, user, stored.memory.id, ReadLevel.EVENTUAL)
            assert await _is_there(stale, user, stored.memory.id, ReadLevel.SESSION)


@pytest.mark.parametrize(
    ("shard_id", "step"),
    [
        ("shard-1", Step.COPYING),
        pytest.param("shard-0", Step.VERIFYING, marks=pytest.mark.slow),
        pytest.param("shard-1", Step.ACTIVE, marks=pytest.mark.slow),
        ("shard-0", Step.ACTIVE),
    ],
    ids=["source while copying", "target while verifying", "source afterwards", "target afterwards"],
)
async def test_a_failover_begins_a_move_anew_or_closes_its_way_back(shard_id: str, step: Step) -> None:
    async with LocalCluster(shards=2, replicas=1) as cluster:
        slots = Slots(cluster, {"rollback_window_s": 3600, "max_slots": 16384})
        writers = Writers(cluster.address, _USERS)
        async with asyncio.TaskGroup() as group:
            group.create_task(writers.run(3))
            try:
                await asyncio.sleep(1)
                async with slots.mover("move", "--first", "9000", "--last", "11000", "--to", "shard-0") as mover:
                    await mover.until(step)
                    mover.send(signal.SIGTERM)
                    await mover.process.communicate()
                await cluster.run("failover", shard_id)
                (move,) = await slots.moves()
                if step is Step.ACTIVE:
                    async with slots.mover("rollback", "--move", str(move.move_id)) as mover:
                        events = [event async for event in mover.events()]
                    assert "failover has closed the way back" in events[-1]["why"]
                await slots.move("resume", "--rollback-window", "0")
            finally:
                writers.stop()
        (move,) = await slots.moves()
        assert move.step is Step.DONE
        assert (move.attempts > 1) == (step is not Step.ACTIVE)
        assert (writers.failures, writers.wrong) == ([], [])
        assert await writers.found() == writers.expected
        assert await slots.left_over() == []


async def test_a_failover_closes_the_rollback_window_of_a_move_that_waits_or_is_about_to() -> None:
    """It is noted by whoever waits, or tells the shards of the hand-over; nobody thinks that it can be brought back."""
    async with LocalCluster(shards=2, replicas=1) as cluster:
        slots = Slots(cluster, {"rollback_window_s": 3600})
        async with slots.mover("move", "--first", "9000", "--last", "9099", "--to", "shard-0") as mover:
            await mover.until(Step.ACTIVE)
            await cluster.run("failover", "shard-1")
            events = [event async for event in mover.events()]
        assert events[-1]["event"] == "done"
        assert next(event["step"] for event in events if event.get("error") == WAY_BACK_CLOSED) == Step.ACTIVE
        (move,) = await slots.moves()
        assert (move.step, move.error, move.rollback_window_s) == (Step.DONE, WAY_BACK_CLOSED, 0)
        assert WAY_BACK_CLOSED in await cluster.run("moves", "list", "--all", "--json")

        async with slots.mover("move", "--first", "9100", "--last", "9199", "--to", "shard-0") as mover:
            await mover.until(Step.ACTIVE)
            mover.send(signal.SIGKILL)
            await mover.process.communicate()
        await cluster.run("failover", "shard-0")
        async with database(cluster.catalog_dsn(owner=True)) as connection:
            # As if it had died before it told the shards.
            await connection.execute("UPDATE moves SET step = 'cut_over', version = version + 1 WHERE first = 9100")

        async def is_told() -> bool:
            return (await slots.moves())[-1].step is not Step.CUT_OVER

        # The supervisor sees that nobody drives it.
        await eventually(is_told, within_s=60)
        move = (await slots.moves())[-1]
        assert (move.step, move.error, move.rollback_window_s) == (Step.ACTIVE, WAY_BACK_CLOSED, 0)
        assert move.rollback_until is None
        await slots.move("resume")
        move = (await slots.moves())[-1]
        assert (move.step, move.error) == (Step.DONE, WAY_BACK_CLOSED)
        assert await slots.left_over() == []


async def _is_safe(cluster: LocalCluster) -> bool:
    """Whether each shard's writes are on two disks when they are acknowledged."""
    status = await cluster.status()
    return all(process["healthy"] for process in status["processes"]) and all(
        shard["durability"] == "QUORUM" for shard in status["shards"]
    )


_FIRST, _LAST = 9000, 11000
_SOURCE, _TARGET = "shard-1", "shard-0"


@asynccontextmanager
async def _held_at(slots: Slots, mover: MoverProcess, step: Step, dying: str) -> AsyncIterator[None]:
    """A mover at work is at the step, and gets no further there until the end, whichever of the shards dies."""
    if step is Step.CUT_OVER:
        # What the dying one is told it is told only after the other one, or not before it is another server.
        async with slots.untold(mover, _SOURCE, _TARGET if dying == _SOURCE else _SOURCE) as untold:
            await mover.until(step)
            await untold.teller()
            yield
        return
    giver, taker = (_TARGET, _SOURCE) if step is Step.RETURNING else (_SOURCE, _TARGET)
    async with slots.fence_held(mover, giver, taker, step):
        assert await slots.fenced(giver) == _LAST - _FIRST + 1
        yield


@pytest.mark.timeout(240)
@pytest.mark.parametrize("dying", [_SOURCE, _TARGET], ids=["source", "target"])
@pytest.mark.parametrize(
    "step",
    [
        Step.FENCED,
        pytest.param(Step.CUT_OVER, marks=pytest.mark.slow),
        pytest.param(Step.RETURNING, marks=pytest.mark.slow),
    ],
)
async def test_a_primary_dies_under_a_mover_at_work(step: Step, dying: str) -> None:
    """While nobody takes writes, or the catalog has just said who does. The mover itself brings the move to an end."""
    async with LocalCluster(shards=2, replicas=1) as cluster:
        await eventually(lambda: _is_safe(cluster), within_s=60)
        is_way_back = step is Step.RETURNING
        slots = Slots(cluster, {"rollback_window_s": 3600 if is_way_back else 0, "max_slots": 16384})
        writers = Writers(cluster.address, _USERS, pause_s=0.02, patience_s=30)
        async with asyncio.TaskGroup() as group:
            group.create_task(writers.run(3))
            try:
                await eventually(lambda: len(writers.writes.times) > 50)
                asked = ["move", "--first", str(_FIRST), "--last", str(_LAST), "--to", _TARGET]
                if is_way_back:
                    async with slots.mover(*asked) as mover:
                        await mover.until(Step.ACTIVE)
                        mover.send(signal.SIGTERM)
                        await mover.process.communicate()
                    asked = ["rollback", "--move", str((await slots.moves())[-1].move_id)]
                async with slots.mover(*asked) as mover:
                    async with _held_at(slots, mover, step, dying):
                        assert (await slots.moves())[-1].step is step
                        old = cluster.primary(dying)
                        cluster.kill(old)
                        await eventually(lambda: cluster.primary(dying) != old, within_s=30)
                    events = [event async for event in mover.events()]
                (move,) = await slots.moves()
                if is_way_back:
                    assert "failover has closed the way back" in events[-1]["why"]
                    assert (move.step, move.may_be_fenced) == (Step.ACTIVE, False)
                    await slots.move("resume", "--rollback-window", "0")
                else:
                    assert events[-1]["event"] == "done"
                    assert move.attempts > 1 or step is not Step.FENCED
            finally:
                writers.stop()
        (move,) = await slots.moves()
        assert move.step is Step.DONE
        topology = await slots.topology()
        assert {topology.owner(slot).shard_id for slot in range(_FIRST, _LAST + 1)} == {_TARGET}
        assert (writers.failures, writers.wrong) == ([], [])
        await check_everything(cluster, writers, searches=5)
        assert wrong(writers) == {}
        assert await slots.left_over() == []
        await eventually(slots.standbys_are_free, within_s=30)


async def far_behind(cluster: LocalCluster, shard_id: str) -> None:
    """Has the shard's primary log two MiB that a standby whose replay is paused does not replay."""
    async with database(cluster.shard_dsn(shard_id, owner=True)) as connection:
        await connection.execute("SELECT pg_logical_emit_message(true, 'test', repeat('x', 2097152))")


async def rows_at(cluster: LocalCluster, shard_id: str, first: int, last: int) -> int:
    """Rows of users: the health monitor's come and go."""
    async with database(cluster.shard_dsn(shard_id)) as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM memories WHERE slot BETWEEN $1 AND $2 AND NOT starts_with(user_id, $3)",
            first, last, PREFIX,
        )  # fmt: skip
        return count


async def test_a_move_waits_for_the_standbys_between_its_parts_whoever_began_it() -> None:
    """Before it copies, also when another process had begun it, and before it removes what it has copied."""
    async with LocalCluster(shards=2, replicas=1) as cluster, AsyncMemoryClient(cluster.address) as client:
        slots = Slots(cluster, {"rollback_window_s": 0, "max_standby_lag_bytes": 2**20, "max_slots": 16384})
        for user in _USERS:
            await client.store(user, "stored before anything moves")
        await eventually(lambda: all(cluster.standbys(shard_id) for shard_id in ("shard-0", "shard-1")))
        async with slots.mover("move", "--first", "8192", "--last", "12000", "--to", "shard-0") as mover:
            await mover.until(Step.PLANNED)
            mover.send(signal.SIGKILL)
            await mover.process.communicate()
        stored = await rows_at(cluster, "shard-1", 8192, 12000)
        assert stored > 0
        async with AsyncExitStack() as stack:
            async with replay_paused(cluster, "shard-0"):
                await far_behind(cluster, "shard-0")
                mover = await stack.enter_async_context(slots.mover("resume", "--rollback-window", "4"))
                assert (await mover.until_event("waiting"))["for"] == ["shard-0"]
                assert (await slots.moves())[-1].step is Step.COPYING
                assert await rows_at(cluster, "shard-0", 8192, 12000) == 0
            await mover.until(Step.ACTIVE)
            async with replay_paused(cluster, "shard-1"):
                async with slots.step_held(Step.ACTIVE):
                    await far_behind(cluster, "shard-1")
                assert (await mover.until_event("waiting"))["for"] == ["shard-1"]
                assert (await slots.moves())[-1].step is Step.CLEANING
                assert await rows_at(cluster, "shard-1", 8192, 12000) == stored
                # Told to end, it does not wait any longer.
                mover.send(signal.SIGTERM)
                await asyncio.wait_for(mover.process.communicate(), 10)
        await slots.move("resume")
        assert (await slots.moves())[-1].step is Step.DONE
        assert await slots.left_over() == []


async def test_a_rate_holds_for_moves_that_are_resumed_and_keeps_nobody_from_ending() -> None:
    async with LocalCluster(shards=2) as cluster, AsyncMemoryClient(cluster.address) as client:
        slots = Slots(cluster, {"rollback_window_s": 0, "concurrency": 1, "max_slots": 16384})
        for user in _USERS:
            await client.store(user, "stored before anything moves")
        ranges = ((8192, 12287), (12288, 16383))
        for first, last in ranges:
            async with slots.mover("move", "--first", str(first), "--last", str(last), "--to", "shard-0") as mover:
                await mover.until(Step.PLANNED)
                mover.send(signal.SIGKILL)
                await mover.process.communicate()
        # Rows of other tables come on top of these.
        rate = max(1, await rows_at(cluster, "shard-1", *ranges[0]) // 5)
        copied: dict[int, float] = {}
        async with Slots(cluster, {**slots.settings, "max_rate": rate}).mover("resume") as mover:
            async for event in mover.events():
                if event.get("step") == Step.VERIFYING and "rows" not in event:
                    copied.setdefault(event["move_id"], time.monotonic())
        assert len(copied) == len(ranges)
        assert max(copied.values()) - min(copied.values()) >= 3
        hurried = Slots(cluster, {**slots.settings, "max_rate": 1, "max_slots": 4096})
        async with hurried.mover("move", "--first", "8192", "--last", "16383", "--to", "shard-1") as mover:
            await mover.until(Step.DONE)
            mover.send(signal.SIGTERM)
            await asyncio.wait_for(mover.process.communicate(), 10)
        await slots.move("rebalance")
        assert await slots.left_over() == []
