"""Moving slots between shards while they are written."""

import asyncio
import json
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
import pytest_asyncio

from common import catalog_moves, catalog_shards
from common.catalog import CatalogError, EpochConflictError, raise_epoch
from common.catalog_moves import MoveConflictError
from common.config import MoverSettings
from common.moves import TARGET_LOST, WAY_BACK_LOST, Step
from common.postgres import NOTICE_LOSS, Connection
from common.probe_user import PREFIX as PROBE
from common.topology import Cutover, Shard, ShardStatus
from local import mover
from local.postgres import SUPERUSER
from memshard import AsyncMemoryClient
from shard import identity, purge
from shard.database import Database
from shard.large_users import indexes
from shard.moving import ownership, side
from shard.moving.driver import leased
from shard.moving.streams import Stream, drop_slot
from shard.moving.tables import MARKS, MOVED, STAYING
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.moving import Slots
from tests.support.wire import database, pool_of_one
from tests.support.writers import Writers

# Past the one function that makes moves, as an older version could.
_STALE_MOVE = """
INSERT INTO moves (first, last, source, target, step) VALUES ($1, $2, $3, $4, $5) RETURNING move_id
"""
_END_MOVE = "UPDATE moves SET step = 'rolled_back', version = version + 1 WHERE move_id = $1"
# Keeps a fence from being made for as long as the transaction lasts, and has nothing else wait for it.
_HOLD_OFF = "LOCK TABLE owned_slots IN ROW SHARE MODE"
_IS_HELD_OFF = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'owned_slots'::regclass AND NOT granted)"
_SET_FENCED_AT = """
UPDATE moves SET fenced_at = now(), source_timeline = 1, target_timeline = 1, version = 2 WHERE move_id = $1
"""
_COUNT_FENCED = "SELECT count(*) FROM owned_slots WHERE state = 'fenced'"
_SET_FENCED = "UPDATE owned_slots SET state = 'fenced' WHERE slot BETWEEN $1 AND $2"
_SET_STATE = "UPDATE owned_slots SET state = $2 WHERE slot = $1"
_INSERT = """
INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                      embedding_model, expire_time)
VALUES ($1, $2, $3, '', '', '', 1, 0.5, 'green tea', '{}', '', $4)
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slots() -> AsyncIterator[Slots]:
    async with LocalCluster(shards=2) as cluster:
        yield Slots(cluster, {"rollback_window_s": 0, "max_slots": 4096})


async def test_every_table_is_known_to_move_or_to_stay(slots: Slots) -> None:
    """A new table must be put into one of the two lists; what has a slot moves with it, by a key that has the slot."""
    async with database(slots.cluster.shard_dsn("shard-0", owner=True)) as connection:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert {row[0] for row in tables} == {*MOVED, MARKS, *STAYING}
        keyed = await connection.fetch(
            """
            SELECT indrelid::regclass::text FROM pg_index JOIN pg_attribute ON attrelid = indrelid
            WHERE indisprimary AND attname = 'slot' AND attnum = ANY (indkey::int2[])
            """
        )
        assert {row[0] for row in keyed} == {*MOVED, MARKS, "owned_slots"}


async def test_rows_of_slots_that_are_not_its_own_are_left_as_they_are(slots: Slots) -> None:
    """As while they are copied: neither purge nor embedding queue may change what replication brings."""
    yesterday = datetime.now(UTC) - timedelta(days=1)
    rows = {
        "own, without": (100, None),
        "without": (9000, None),
        "own, expired": (100, yesterday),
        "expired": (9000, yesterday),
    }
    async with (
        database(slots.cluster.shard_dsn("shard-0", owner=True)) as connection,
        pool_of_one(slots.cluster.shard_dsn("shard-0")) as pool,
    ):
        for user, (slot, expire_time) in rows.items():
            await connection.execute(_INSERT, slot, user, uuid.uuid4(), expire_time)

        async def untouched() -> set[str]:
            found = await connection.fetch("SELECT user_id FROM memories WHERE embedding IS NULL AND content <> ''")
            return {row["user_id"] for row in found}

        async def own_are_done() -> bool:
            await purge.purge(Database(pool), purge.Retention(tombstone_s=3600, version_s=3600))
            return not any(user.startswith("own") for user in await untouched())

        await eventually(own_are_done)
        assert await untouched() == {"without", "expired"}
        # Nor is the queue at them all the time.
        assert slots.cluster.layout.log("shard-0").read_text().count('"event": "embedded"') <= 2
        await connection.execute("DELETE FROM memories")


async def test_a_shard_is_drained_while_it_is_written(slots: Slots) -> None:
    writers = Writers(slots.cluster.address, [f"mover-{number}" for number in range(60)])
    async with asyncio.TaskGroup() as group:
        group.create_task(writers.run())
        try:
            await asyncio.sleep(1)
            before = await slots.topology()
            events = await slots.move("drain", "--shard", "shard-1")
        finally:
            writers.stop()
    pauses = [event["pause_ms"] for event in events if "pause_ms" in event]
    print(f"pauses {pauses} ms, slowest write {writers.slowest_s:.3f} s, {len(writers.writes.times)} writes")
    after = await slots.topology()
    assert (before.slot_count("shard-1"), after.slot_count("shard-1")) == (8192, 0)
    assert (writers.failures, writers.wrong) == ([], [])
    assert await writers.found() == writers.expected
    assert await slots.left_over() == []
    assert not any((await slots.rows())["shard-1"].values())
    # A mover says what it would do, and what was done.
    assert (await slots.move("plan"))[0] == {"event": "plan", "slots": 0, "moves": []}
    assert {move["step"] for move in (await slots.move("list"))[-1]["moves"]} == {"done"}


async def samples(cluster: LocalCluster) -> dict[tuple[str, ...], float]:
    """What the router has on its page of moves: by name, and labels in the order of their names."""
    families = await families_of(cluster, "router-0")
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for name in ("memory_moves", "memory_moves_unattended", "memory_moves_overdue", "memory_moving_slots")
        for sample in families[name].samples
    }


async def test_a_move_under_way_is_seen_and_whether_it_has_stopped(slots: Slots) -> None:
    cluster, data_dir = slots.cluster, str(slots.cluster.data_dir)
    # It has been drained, and would get none.
    await cluster.run("shards", "set", "shard-1", "--status", "active")
    before = await samples(cluster)

    async def is_seen(step: str, *, stopped: bool) -> bool:
        found = await samples(cluster)
        wanted = {
            ("memory_moves", step): 1,
            ("memory_moves_unattended",): 1 if stopped else 0,
            ("memory_moving_slots", "out", "shard-0"): 100,
            ("memory_moving_slots", "in", "shard-1"): 100,
            ("memory_moving_slots", "in", "shard-0"): 0,
        }
        assert {key: found[key] for key in wanted} == wanted
        return True

    async def shown() -> str:
        code, output = await command("top", "--once", "--data-dir", data_dir)
        assert code == 0
        return output

    # Two polls of the catalog are 10 s.
    await stopped_in(slots, Step.COPYING, "move", "--first", "0", "--last", "99", "--to", "shard-1")
    await eventually(lambda: is_seen("copying", stopped=True), within_s=15)
    assert "100 slots  shard-0 → shard-1  stopped at copying" in await shown()
    async with slots.mover("resume", "--rollback-window", "600") as running:
        await running.until("active")
        await eventually(lambda: is_seen("active", stopped=False), within_s=15)
        assert "100 slots  shard-0 → shard-1  active" in await shown()
    assert (await samples(cluster))["memory_moves_overdue",] == 0
    # As if ten minutes had passed.
    async with database(cluster.catalog_dsn(owner=True)) as catalog:
        await catalog.execute("UPDATE moves SET rollback_window_s = 0 WHERE step = 'active'")

    async def is_overdue() -> bool:
        return (await samples(cluster))["memory_moves_overdue",] == 1

    await eventually(is_overdue, within_s=15)
    await slots.move("resume", "--rollback-window", "0")

    async def is_over() -> bool:
        found = await samples(cluster)
        steps = {key: value - before[key] for key, value in found.items() if key[0] == "memory_moves"}
        return {key[1]: value for key, value in steps.items() if value} == {Step.DONE: 1}

    await eventually(is_over, within_s=15)
    assert not any(value for key, value in (await samples(cluster)).items() if key[0] != "memory_moves")
    assert await slots.left_over() == []


@pytest.mark.parametrize("others_setting_s", [0, 600])
async def test_a_move_can_be_brought_back_for_as_long_as_it_was_made_for_whoever_settles_it(
    slots: Slots, others_setting_s: float
) -> None:
    window = timedelta(seconds=4)
    made = Slots(slots.cluster, {**slots.settings, "rollback_window_s": window.total_seconds()})
    topology = await slots.topology()
    source, target = ("shard-0", "shard-1") if topology.owner(400).shard_id == "shard-0" else ("shard-1", "shard-0")
    await slots.cluster.run("shards", "set", target, "--status", "active")
    async with made.mover("move", "--first", "400", "--last", "450", "--to", target) as running:
        await running.until("active")
        running.send()
        await running.process.wait()
    (listed,) = json.loads(await slots.cluster.run("moves", "list", "--json"))["moves"]
    until = datetime.fromisoformat(listed["rollback_until_time"])
    assert until - datetime.fromisoformat(listed["cutover_time"]) == window
    assert f"{until.astimezone():%Y-%m-%d %H:%M:%S}" in await slots.cluster.run("moves", "list")
    assert source not in {(await slots.topology()).owner(slot).shard_id for slot in range(400, 451)}
    others = Slots(slots.cluster, {**slots.settings, "rollback_window_s": others_setting_s})
    events = await others.move("resume")
    ended = datetime.now(UTC)
    begun = next(event for event in events if event.get("step") == "cleaning")
    assert (begun["move_id"], ended >= until) == (int(listed["move_id"]), True)
    assert (await slots.moves())[-1].step is Step.DONE


async def test_a_move_that_is_driven_has_not_stopped(slots: Slots) -> None:
    async with database(slots.cluster.catalog_dsn(owner=True)) as driver, database(slots.cluster.catalog_dsn()) as app:
        move = await catalog_moves.create_move(driver, 200, 299, "shard-0", "shard-1")
        (seen,) = (await catalog_moves.read_progress(app)).open
        assert (seen.move, seen.is_driven, seen.is_stopped) == (move, False, True)
        assert await catalog_moves.take_lease(driver, move.move_id)
        (seen,) = (await catalog_moves.read_progress(app)).open
        assert (seen.is_driven, seen.is_stopped) == (True, False)
        done = await catalog_moves.change_move(driver, move, replace(move, step=Step.ROLLED_BACK))
        progress = await catalog_moves.read_progress(app)
        assert (progress.open, progress.ended[done.step]) == ((), 1)


async def test_a_move_that_waits_has_stopped_once_its_rollback_window_is_over_for_a_while(slots: Slots) -> None:
    """Whoever waited would be at work on it."""
    set_past = "UPDATE moves SET cutover_at = now() - interval '90 seconds', rollback_window_s = $2 WHERE move_id = $1"
    async with database(slots.cluster.catalog_dsn(owner=True)) as driver, database(slots.cluster.catalog_dsn()) as app:
        topology = await slots.topology()
        first = next(owned.first for owned in topology.ranges if owned.shard_id == "shard-0")
        move_id = await driver.fetchval(_STALE_MOVE, first, first, "shard-1", "shard-0", Step.ACTIVE.value)
        try:
            for window_s, is_stopped in ((0, True), (20, True), (40, False), (600, False)):
                await driver.execute(set_past, move_id, window_s)
                (seen,) = (await catalog_moves.read_progress(app)).open
                assert (seen.move.step, seen.is_stopped) == (Step.ACTIVE, is_stopped)
            await driver.execute(set_past, move_id, 0)
            assert await catalog_moves.take_lease(driver, move_id)
            (seen,) = (await catalog_moves.read_progress(app)).open
            assert not seen.is_stopped
        finally:
            await driver.execute(_END_MOVE, move_id)


async def test_a_hand_over_is_recorded_whole_or_not_at_all(slots: Slots) -> None:
    """Epoch and move both are what it was planned against, or nothing changes."""
    async with database(slots.cluster.catalog_dsn(owner=True)) as connection:
        # Places of this test's own, which are before those that the servers have come to.
        await connection.execute("DELETE FROM cutovers")
        move = await catalog_moves.create_move(connection, 300, 399, "shard-0", "shard-1")
        before = await slots.topology()
        standing = await catalog_moves.read_standing(connection, "shard-0", "shard-1")
        assert (standing.epoch, standing.ranges) == (before.epoch, before.ranges)
        assert standing.address == next(shard.address for shard in before.shards if shard.shard_id == "shard-1")
        over = replace(move, step=Step.CUT_OVER, cutover_at=datetime.now(UTC))
        for stale, planned, error in (
            (replace(standing, epoch=standing.epoch - 1), move, EpochConflictError),
            (standing, replace(move, version=move.version + 1), MoveConflictError),
        ):
            with pytest.raises(error):
                await catalog_moves.hand_over(connection, stale, planned, over, "shard-0", "shard-1", (1, 4711))
            assert await slots.topology() == before
            assert await catalog_moves.read_move(connection, move.move_id) == move
        there = await catalog_moves.hand_over(connection, standing, move, over, "shard-0", "shard-1", (1, 4711))
        after = await slots.topology()
        assert await catalog_moves.read_move(connection, move.move_id) == there
        assert (there.step, there.cutover_epoch, after.epoch) == (Step.CUT_OVER, before.epoch + 1, before.epoch + 1)
        assert {after.owner(slot).shard_id for slot in range(300, 400)} == {"shard-1"}
        assert [after.owner(slot) for slot in (299, 400)] == [before.owner(slot) for slot in (299, 400)]
        assert Cutover("shard-0", "shard-1", 1, 4711) in after.cutovers
        # A move side by side may have read a later place, and been recorded before. Only ever onwards.
        for at, known in (
            ((1, 4000), (1, 4711)),
            ((2, 4000), (2, 4000)),
            ((1, 5000), (2, 4000)),
            ((2, 5000), (2, 5000)),
        ):
            for giver, taker in (("shard-1", "shard-0"), ("shard-0", "shard-1")):
                standing = await catalog_moves.read_standing(connection, giver, taker)
                there = await catalog_moves.hand_over(connection, standing, there, over, giver, taker, at)
            assert Cutover("shard-0", "shard-1", *known) in (await slots.topology()).cutovers
        # The shards were never told.
        standing = await catalog_moves.read_standing(connection, "shard-1", "shard-0")
        back = replace(there, step=Step.ROLLED_BACK)
        await catalog_moves.hand_over(connection, standing, there, back, "shard-1", "shard-0", (1, 4712))
        assert (await slots.topology()).ranges == before.ranges
        await connection.execute("DELETE FROM cutovers")


async def failed(slots: Slots, *arguments: str) -> str:
    """Runs a mover that must not succeed; why it says it did not."""
    async with slots.mover(*arguments) as running:
        events = [event async for event in running.events()]
    assert events[-1]["event"] == "failed", events[-3:]
    return str(events[-1]["why"])


async def users_rows(slots: Slots) -> dict[str, dict[str, set[tuple[Any, ...]]]]:
    """Every row of every table that moves, by shard, but for what is written all the time to see whether it goes."""
    return {
        shard_id: {table: {row for row in rows if PROBE not in row[0]} for table, rows in tables.items()}
        for shard_id, tables in (await slots.rows()).items()
    }


async def all_rows(slots: Slots) -> dict[str, set[tuple[Any, ...]]]:
    """The same wherever they are."""
    rows = await users_rows(slots)
    return {table: rows["shard-0"][table] | rows["shard-1"][table] for table in MOVED}


async def test_a_mover_with_an_old_plan_leaves_a_range_that_has_gone_over_where_it_is(slots: Slots) -> None:
    """Two movers, one plan: the first stands still while the second moves the plan's last range."""
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    before = await all_rows(slots)
    assert before["memories"]
    one_by_one = Slots(slots.cluster, {**slots.settings, "concurrency": 1})
    async with one_by_one.mover("rebalance") as first:
        planned = (await anext(first.events()))["moves"]
        assert len(planned) > 1
        first.send(signal.SIGSTOP)
        last = planned[-1]
        async with slots.mover(
            "move", "--first", str(last["first"]), "--last", str(last["last"]), "--to", last["target"]
        ) as second:
            events = [event async for event in second.events()]
        assert events[-1]["event"] == "done", events[-1]
        first.send(signal.SIGCONT)
        events = [event async for event in first.events()]
    assert events[-1]["event"] == "failed"
    assert "do not all belong to" in events[-1]["why"]
    # What it could do, it has done.
    topology = await slots.topology()
    assert {topology.owner(move["first"]).shard_id for move in planned} == {last["target"]}
    assert {move.step for move in (await slots.moves())[-len(planned) :]} == {Step.DONE}
    assert await all_rows(slots) == before
    assert await slots.left_over() == []


@pytest.mark.parametrize(
    ("shard_id", "status", "is_made"),
    [
        ("shard-0", ShardStatus.DRAINING, True),
        ("shard-0", ShardStatus.READONLY, False),
        ("shard-0", ShardStatus.MAINTENANCE, False),
        ("shard-1", ShardStatus.DRAINING, False),
        ("shard-1", ShardStatus.READONLY, False),
        ("shard-1", ShardStatus.MAINTENANCE, False),
    ],
)
async def test_a_move_is_made_only_between_shards_whose_status_lets_slots_go(
    slots: Slots, shard_id: str, status: ShardStatus, is_made: bool
) -> None:
    """From shard-0 to shard-1: one of them is set to something else than active after the plan was made."""
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    async with (
        database(slots.cluster.catalog_dsn(owner=True)) as other,
        database(slots.cluster.catalog_dsn(owner=True)) as mover,
    ):
        epoch, transaction = (await slots.topology()).epoch, other.transaction()
        await transaction.start()
        await catalog_shards.set_status(other, epoch, shard_id, status)
        made = asyncio.ensure_future(catalog_moves.create_move(mover, first, first, "shard-0", "shard-1"))

        async def waits() -> bool:
            return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        # A status that is just being set is waited for.
        await eventually(waits)
        await transaction.commit()
        try:
            if is_made:
                await mover.execute(_END_MOVE, (await made).move_id)
            else:
                refused = rf"{shard_id} \({status}\)"
                with pytest.raises(MoveConflictError, match=refused):
                    await made
                with pytest.raises(MoveConflictError, match=refused):
                    await catalog_moves.create_move(mover, first, first, "shard-0", "shard-1")
        finally:
            await catalog_shards.set_status(other, epoch + 1, shard_id, ShardStatus.ACTIVE)


async def test_a_rebalance_ends_when_a_shard_is_to_get_nothing_any_more(slots: Slots) -> None:
    """What of its plan is left to be done it leaves, and says so."""
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    await slots.cluster.run("shards", "set", "shard-1", "--weight", "2")
    one_by_one = Slots(slots.cluster, {**slots.settings, "max_slots": 512, "concurrency": 1})
    try:
        async with (
            database(slots.cluster.catalog_dsn(owner=True)) as connection,
            one_by_one.mover("rebalance") as running,
        ):
            planned = (await anext(running.events()))["moves"]
            assert len(planned) > 2
            running.send(signal.SIGSTOP)
            epoch = (await slots.topology()).epoch
            await catalog_shards.set_status(connection, epoch, "shard-1", ShardStatus.READONLY)
            running.send(signal.SIGCONT)
            events = [event async for event in running.events()]
        assert events[-1]["event"] == "failed"
        assert "shard-1 (readonly)" in events[-1]["why"]
        topology = await slots.topology()
        assert [topology.owner(move["first"]).shard_id for move in planned[2:]] == [m["source"] for m in planned[2:]]
        assert await slots.left_over() == []
    finally:
        await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
        await slots.cluster.run("shards", "set", "shard-1", "--weight", "1")
        await slots.move("rebalance")


async def test_a_move_is_made_only_of_slots_that_the_source_has_at_that_moment(slots: Slots) -> None:
    """A hand-over that is being recorded meanwhile is waited for."""
    topology = await slots.topology()
    first = next(owned.first for owned in topology.ranges if owned.shard_id == "shard-1")
    before = await slots.moves()
    async with (
        database(slots.cluster.catalog_dsn(owner=True)) as other,
        database(slots.cluster.catalog_dsn(owner=True)) as mover,
    ):
        with pytest.raises(MoveConflictError):
            await catalog_moves.create_move(mover, first, first, "shard-0", "shard-1")
        transaction = other.transaction()
        await transaction.start()
        await raise_epoch(other, topology.epoch)
        await other.execute("UPDATE slot_ranges SET shard_id = 'shard-0' WHERE first = $1", first)
        made = asyncio.ensure_future(catalog_moves.create_move(mover, first, first, "shard-1", "shard-0"))

        async def waits() -> bool:
            return bool(await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await eventually(waits)
        await transaction.commit()
        try:
            with pytest.raises(MoveConflictError):
                await made
        finally:
            # As a newer topology: routers have seen the other one.
            async with other.transaction():
                await raise_epoch(other, topology.epoch + 1)
                await other.execute("UPDATE slot_ranges SET shard_id = 'shard-1' WHERE first = $1", first)
    assert await slots.moves() == before


@pytest.mark.parametrize("step", [Step.PLANNED, Step.ROLLING_BACK])
async def test_nothing_is_removed_from_a_target_that_has_the_slots(slots: Slots, step: Step) -> None:
    """Not even when the catalog has a move that says otherwise."""
    async with AsyncMemoryClient(slots.cluster.address) as client:
        for number in range(16):
            await client.store(f"kept-{number}", "green tea")
    before, topology = await users_rows(slots), await slots.topology()
    assert before["shard-0"]["memories"]
    everything = [owned for owned in topology.ranges if owned.shard_id == "shard-0"]
    async with database(slots.cluster.catalog_dsn(owner=True)) as connection:
        for owned in everything:
            move_id = await connection.fetchval(_STALE_MOVE, owned.first, owned.last, "shard-1", "shard-0", step.value)
            try:
                assert "serves" in await failed(slots, "resume", "--move", str(move_id))
                assert "serves" in (await catalog_moves.read_move(connection, move_id)).error
            finally:
                await connection.execute(_END_MOVE, move_id)
    assert await users_rows(slots) == before
    assert await slots.left_over() == []


async def test_nothing_is_removed_from_a_source_before_the_target_has_the_slots(slots: Slots) -> None:
    topology = await slots.topology()
    slot = next(owned.first for owned in topology.ranges if owned.shard_id == "shard-1")
    async with (
        database(slots.cluster.catalog_dsn(owner=True)) as connection,
        database(slots.cluster.shard_dsn("shard-0", owner=True)) as source,
        database(slots.cluster.shard_dsn("shard-1", owner=True)) as target,
    ):
        await source.execute(_INSERT, slot, "left", uuid.uuid4(), None)
        await target.execute(_SET_STATE, slot, "fenced")
        move_id = await connection.fetchval(_STALE_MOVE, slot, slot, "shard-0", "shard-1", Step.CLEANING.value)
        count = "SELECT count(*) FROM memories WHERE slot = $1 AND user_id = 'left'"
        try:
            assert "has only 0 of the slots" in await failed(slots, "resume", "--move", str(move_id))
            assert await source.fetchval(count, slot) == 1
        finally:
            await target.execute(_SET_STATE, slot, "own")
        await slots.move("resume", "--move", str(move_id))
        assert await source.fetchval(count, slot) == 0
    assert await slots.left_over() == []


async def test_a_shard_that_comes_has_none_of_the_cutovers_of_an_earlier_one_of_its_name(slots: Slots) -> None:
    """Its log begins anew, and a cutover never goes back."""
    record = "INSERT INTO cutovers (source, target, timeline, lsn, epoch) VALUES ($1, $2, 1, $3, 1)"
    async with database(slots.cluster.catalog_dsn(owner=True)) as connection:
        for source, target, lsn in (
            ("old", "new", 900),
            ("new", "newer", 300),
            ("old", "newer", 200),
            ("new", "old", 5),
        ):
            await connection.execute(record, source, target, lsn)
        epoch = (await slots.topology()).epoch
        try:
            epoch = await catalog_shards.add_shard(connection, epoch, Shard("new", "127.0.0.1:1"))
            known = {(cutover.source, cutover.target): cutover.lsn for cutover in (await slots.topology()).cutovers}
            of_them = {pair: lsn for pair, lsn in known.items() if not {"old", "new"}.isdisjoint(pair)}
            assert of_them == {("old", "newer"): 300, ("new", "newer"): 300, ("new", "old"): 5}
        finally:
            await catalog_shards.remove_shard(connection, epoch, "new")
            await connection.execute("DELETE FROM cutovers WHERE source IN ('old', 'new')")


async def test_the_name_of_a_shard_that_had_slots_is_not_given_to_another(slots: Slots) -> None:
    """A session that had written to it would wait for a place in its log."""
    went_over = "UPDATE moves SET cutover_epoch = 1 WHERE move_id = $1"
    async with database(slots.cluster.catalog_dsn(owner=True)) as connection:
        moves = [
            await connection.fetchval(_STALE_MOVE, 0, 0, source, target, step.value)
            for source, target, step in (
                ("drained", "shard-0", Step.DONE),
                ("shard-0", "filled", Step.DONE),
                ("shard-0", "never", Step.ROLLED_BACK),
            )
        ]
        await connection.execute(went_over, moves[1])
        topology = await slots.topology()
        try:
            for name, why in (
                ("drained", "name of a shard that had slots"),
                ("filled", "name of a shard that had slots"),
                ("shard-0", "there is a shard shard-0 already"),
            ):
                with pytest.raises(CatalogError, match=why):
                    await catalog_shards.add_shard(connection, topology.epoch, Shard(name, "127.0.0.1:1"))
            assert await slots.topology() == topology
            epoch = await catalog_shards.add_shard(connection, topology.epoch, Shard("never", "127.0.0.1:1"))
            await catalog_shards.remove_shard(connection, epoch, "never")
        finally:
            await connection.execute("DELETE FROM moves WHERE move_id = ANY ($1::bigint[])", moves)


async def test_a_catalog_that_is_there_is_not_made_again_nor_its_moves_ended(slots: Slots) -> None:
    before = await users_rows(slots)
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    patient = Slots(slots.cluster, {**slots.settings, "rollback_window_s": 600})
    async with patient.mover("move", "--first", str(first), "--last", str(first + 99), "--to", "shard-1") as running:
        await running.until("active")
        running.send()
        await running.process.wait()
    under_way, left = (await slots.moves())[-1], await slots.left_over()
    assert under_way.step is Step.ACTIVE
    addresses = [f"--shard={shard.shard_id}={shard.address}" for shard in (await slots.topology()).shards]
    assert "holds a cluster" in await failed(slots, "rebuild", *addresses)
    assert await slots.left_over() == left
    await slots.move("rollback", "--move", str(under_way.move_id))
    assert await users_rows(slots) == before
    assert await slots.left_over() == []


@pytest.mark.parametrize("mover_is", ["at work", "killed"])
async def test_a_source_takes_writes_again_in_good_time_when_the_target_hangs(slots: Slots, mover_is: str) -> None:
    """Whatever becomes of the mover. Nothing else is kept by the target: the source has the slots."""
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    before = await users_rows(slots)
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    timeout_s = 5.0
    hasty = Slots(slots.cluster, {**slots.settings, "fence_timeout_s": timeout_s})

    async def fenced(connection: Connection) -> bool:
        return bool(await connection.fetchval(_COUNT_FENCED))

    async with (
        database(slots.cluster.shard_dsn("shard-0", owner=True)) as source,
        hasty.mover("move", "--first", str(first), "--last", str(first + 99), "--to", "shard-1") as running,
    ):
        held = source.transaction()
        await held.start()
        await source.execute(_HOLD_OFF)
        await running.until("fenced")
        await eventually(lambda: source.fetchval(_IS_HELD_OFF))
        with frozen_server(slots.cluster, slots.cluster.primary("shard-1")):
            await held.rollback()
            await eventually(lambda: fenced(source))
            if mover_is == "killed":
                running.send()
            began = time.monotonic()
            while await fenced(source):
                assert time.monotonic() - began < timeout_s + 10
                await asyncio.sleep(0.05)
            # Nobody has to look after it any more.
            await eventually(lambda: settled(slots), within_s=10)
        print(f"it took {time.monotonic() - began:.1f} s")
        if mover_is == "killed":
            await running.process.wait()
    await slots.move("resume")
    assert (await slots.moves())[-1].step is Step.DONE
    assert await slots.left_over() == []
    await slots.move("move", "--first", str(first), "--last", str(first + 99), "--to", "shard-0")
    assert await users_rows(slots) == before


@contextmanager
def frozen_server(cluster: LocalCluster, name: str) -> Iterator[None]:
    """A server that takes connections, and does nothing."""
    stopped: list[psutil.Process] = []
    try:
        postmaster = psutil.Process(cluster.pid(name))
        for process in (postmaster, *postmaster.children(recursive=True)):
            process.suspend()
            stopped.append(process)
        yield
    finally:
        for process in stopped:
            # The first of them may end others.
            with suppress(psutil.NoSuchProcess):
                process.resume()


async def stopped_in(slots: Slots, step: Step, *asked: str) -> None:
    """A mover is killed when it has done all that is to be done in a step, but for recording it."""
    async with slots.step_held(step) as held, slots.mover(*asked) as running:
        await running.until(step)
        await held.is_done()
        running.send()
        await running.process.wait()
        await held.end_sessions()


@asynccontextmanager
async def as_superuser(cluster: LocalCluster, shard_id: str) -> AsyncIterator[Connection]:
    plan = cluster.plan()
    server = plan.shard_servers(shard_id)[cluster.primary(shard_id)]
    async with database(server.dsn(SUPERUSER, plan.secrets.postgres)) as connection:
        yield connection


@pytest.mark.timeout(240)
@pytest.mark.parametrize("step", [Step.COPYING, Step.FENCED, Step.RETURNED])
async def test_a_move_whose_target_is_lost_for_good_ends_on_its_source_alone(slots: Slots, step: Step) -> None:
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    before = await users_rows(slots)
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    asked = ["move", "--first", str(first), "--last", str(first + 99), "--to", "shard-1"]
    if step is Step.RETURNED:
        patient = Slots(slots.cluster, {**slots.settings, "rollback_window_s": 600})
        async with patient.mover(*asked) as running:
            await running.until(Step.ACTIVE)
            running.send()
            await running.process.wait()
        await stopped_in(slots, step, "rollback", "--move", str((await slots.moves())[-1].move_id))
    else:
        await stopped_in(slots, step, *asked)
    lost = ["rollback", "--move", str((await slots.moves())[-1].move_id), "--target-lost"]
    async with as_superuser(slots.cluster, "shard-0") as source, as_superuser(slots.cluster, "shard-1") as target:
        if step is Step.RETURNED:
            # As before it was told.
            await source.execute(_SET_FENCED, first, first + 99)
        # As of the first copy of a table, which was cut short, to this target and to somebody else.
        system = await target.fetchval("SELECT system_identifier FROM pg_control_system()")
        own = [f"pg_16999_sync_16400_{system}"] if step.is_before_cutover else []
        for name in (*own, "pg_16999_sync_16400_7"):
            await source.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", name)
        is_fenced = await slots.fenced("shard-0")
        assert (is_fenced > 0) == (step is not Step.COPYING)
        with frozen_server(slots.cluster, slots.cluster.primary("shard-1")):
            events = await slots.move(*lost)
            assert [event["step"] for event in events if event["event"] == "move"] == ["rolled_back"]
            assert await slots.move(*lost) == [{"event": "done"}]
            move = (await slots.moves())[-1]
            assert (move.step, move.error, move.may_be_fenced) == (Step.ROLLED_BACK, TARGET_LOST, False)
            assert await slots.left_over("shard-0") == ["shard-0: slot pg_16999_sync_16400_7"]
        await source.execute("SELECT pg_drop_replication_slot('pg_16999_sync_16400_7')")
    # It is back after all: whatever it has is of no harm, and goes when slots are to come again.
    assert await users_rows(slots) == before
    await slots.move(*asked)
    assert await slots.left_over() == []
    await slots.move("move", "--first", str(first), "--last", str(first + 99), "--to", "shard-0")
    assert await users_rows(slots) == before


async def test_a_target_that_answers_is_not_given_up_as_lost(slots: Slots) -> None:
    """Whatever it answers: that it lets nobody in says that it is there."""
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    asked = ["move", "--first", str(first), "--last", str(first + 99), "--to", "shard-1"]
    await stopped_in(slots, Step.COPYING, *asked)
    move = (await slots.moves())[-1]
    lost = ["rollback", "--move", str(move.move_id), "--target-lost"]
    assert "shard-1 can be reached" in await failed(slots, *lost)
    assert (await slots.moves())[-1] == move
    dsns = mover.settings(slots.cluster.plan())["shard_dsns"]
    wrong = {**dsns, "shard-1": re.sub(r":[^:@/]+@", ":wrong@", dsns["shard-1"])}
    assert wrong != dsns
    locked_out = Slots(slots.cluster, {**slots.settings, "shard_dsns": wrong})
    assert "shard-1 can be reached" in await failed(locked_out, *lost)
    await slots.move("rollback", "--move", str(move.move_id))
    assert await slots.left_over() == []


async def test_a_table_that_is_truncated_while_slots_are_fenced_has_the_move_compare_anew(slots: Slots) -> None:
    """What a TRUNCATE removed is in no message; it must not end the mover with the fence standing."""
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    topology = await slots.topology()
    first = next(owned.first for owned in topology.ranges if owned.shard_id == "shard-0")
    arguments = ("--first", str(first), "--last", str(first + 99))
    async with (
        database(slots.cluster.shard_dsn("shard-0", owner=True)) as source,
        slots.mover("move", *arguments, "--to", "shard-1") as running,
    ):
        async with source.transaction():
            await source.execute(_HOLD_OFF)
            await running.until("fenced")
            await eventually(lambda: source.fetchval(_IS_HELD_OFF))
            # With placement by user there never is anything in it.
            await source.execute("TRUNCATE request_claims")
        events = [event async for event in running.events()]
    assert events[-1]["event"] == "done", events[-1]
    given_up = next(event for event in events if event.get("step") == "verifying")
    assert "truncated" in given_up["error"]
    assert (await slots.moves())[-1].step is Step.DONE
    assert await slots.left_over() == []
    await slots.move("move", *arguments, "--to", "shard-0")


async def test_a_moves_indexes_are_made_with_the_memory_that_is_set_and_hold_no_move_up(slots: Slots) -> None:
    """The target serves without one that could not be made."""
    # Any index that is there stands for the one of a user in a slot.
    make = "CREATE INDEX memories_own_stand_in ON memories (id)"
    record = "INSERT INTO own_indexes (name, key, user_hash, slot) VALUES ('memories_own_stand_in', 4711, '', 7)"
    async with (
        database(slots.cluster.shard_dsn("shard-0", owner=True)) as source,
        database(slots.cluster.shard_dsn("shard-1", owner=True)) as target,
        database(slots.cluster.catalog_dsn(owner=True)) as no_shard,
    ):
        known = await identity.read(target)
        assert known is not None

        async def followed(giver: Connection, taker: Connection, memory_mb: int = 64) -> int:
            return await indexes.follow(giver, taker, known, 7, 7, memory_mb=memory_mb, patience_s=5)

        await source.execute(f"{make}; {record}")
        try:
            assert await followed(source, target, 77) == 1
            assert await target.fetchval("SHOW maintenance_work_mem") == "77MB"
            for index in await indexes.existing(target):
                if index.key == 4711:
                    await indexes.drop(target, index.name)
            # Neither has the tables.
            assert await followed(no_shard, target) == 0
            assert await followed(source, no_shard) == 0
        finally:
            await indexes.drop(source, "memories_own_stand_in")


async def settled(slots: Slots) -> bool:
    """Whether the last move leaves nobody without a shard that takes writes, and says so."""
    move = (await slots.moves())[-1]
    return move.fenced_at is None and not move.may_be_fenced


async def lose_slot(slots: Slots, shard_id: str, name: str) -> None:
    """Drops a replication slot, as a server invalidates one that keeps too much log."""
    settings = MoverSettings.model_validate(mover.settings(slots.cluster.plan()))
    async with side.opened(shard_id, settings.shard_dsn(shard_id), 0) as there:
        await drop_slot(there, name)


async def to_be_moved(slots: Slots) -> tuple[list[str], str, str]:
    """Arguments that move a hundred slots, and from where to where."""
    await slots.cluster.run("shards", "set", "shard-1", "--status", "active")
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    return ["move", "--first", str(first), "--last", str(first + 99), "--to", "shard-1"], "shard-0", "shard-1"


@pytest.mark.parametrize("step", [Step.ACTIVE, Step.RETURNING])
async def test_a_move_whose_way_back_is_lost_stays_where_it_went_and_says_so(slots: Slots, step: Step) -> None:
    """It does not return for ever, nor with slots that nobody may write to."""
    held = Slots(slots.cluster, {**slots.settings, "rollback_window_s": 600})
    asked, _, target = await to_be_moved(slots)
    async with held.mover(*asked) as running:
        await running.until(Step.ACTIVE)
        running.send(signal.SIGTERM)
        await running.process.communicate()
    move = (await slots.moves())[-1]
    back = ("rollback", "--move", str(move.move_id))
    if step is Step.RETURNING:
        await stopped_in(held, step, *back)
        assert await slots.fenced(target) == move.slots
    await lose_slot(slots, target, f"memshard_move_{move.move_id}_reverse")
    assert await failed(slots, *back) == WAY_BACK_LOST
    assert await slots.fenced(target) == 0
    move = (await slots.moves())[-1]
    assert (move.step, move.error, move.rollback_until) == (Step.ACTIVE, WAY_BACK_LOST, None)
    await slots.move("resume")
    assert (await slots.moves())[-1].step is Step.DONE
    assert await slots.left_over() == []


@pytest.mark.parametrize(("step", "way"), [(Step.VERIFYING, "forward"), (Step.REVERSING, "reverse")])
async def test_a_move_that_loses_a_slot_before_it_has_gone_over_begins_anew(slots: Slots, step: Step, way: str) -> None:
    asked, source, target = await to_be_moved(slots)
    async with slots.step_held(step) as held, slots.mover(*asked) as running:
        await running.until(step)
        await held.is_done()
        name = f"memshard_move_{(await slots.moves())[-1].move_id}_{way}"
        await lose_slot(slots, source if way == "forward" else target, name)
        await held.release()
        events = [event async for event in running.events()]
    assert events[-1]["event"] == "done", events[-1]
    begun = next(event for event in events if event.get("step") == Step.PLANNED)
    assert name in begun["error"]
    assert (await slots.moves())[-1].step is Step.DONE
    assert await slots.left_over() == []


async def test_a_hand_over_that_is_being_recorded_is_not_cut_short_by_the_deadline_of_its_fence(slots: Slots) -> None:
    """A commit that is cancelled while it waits for a standby is seen by everybody, and gone with the server."""
    deadline_s = 3.0
    asked, _, _ = await to_be_moved(slots)
    hasty = Slots(slots.cluster, {**slots.settings, "fence_timeout_s": deadline_s})
    async with slots.step_held(Step.FENCED) as held, hasty.mover(*asked) as running:
        await running.until(Step.FENCED)
        await held.is_waited_for(deadline_s + 0.5)
        await held.release()
        events = [event async for event in running.events()]
    assert events[-1]["event"] == "done", events[-1]
    steps = [event["step"] for event in events if event["event"] == "move" and event["step"] != Step.FENCED]
    assert steps[0] == Step.CUT_OVER
    assert (await slots.moves())[-1].attempts == 1
    assert await slots.left_over() == []


async def test_a_mark_is_higher_than_the_one_before_whatever_the_clock_says(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Movers on two machines, the second of which is behind: a mark of the first has arrived long ago."""
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    dsns = [slots.cluster.shard_dsn(shard_id, owner=True) for shard_id in ("shard-0", "shard-1")]
    move_id = 4711
    async with side.opened("shard-0", dsns[0], move_id) as giver, side.opened("shard-1", dsns[1], move_id) as taker:
        stream = Stream(giver, taker, move_id, "forward", first, first)
        try:
            mark = await stream.mark()
            monkeypatch.setattr(time, "time_ns", lambda: 1)
            again = await stream.mark()
            fenced = await ownership.fence(giver, first, first, timeout_s=5, move_id=move_id, way=stream.way, mark=1)
            assert mark < again < fenced.mark
        finally:
            monkeypatch.undo()
            await ownership.unfence(giver, first, first)
            await giver.connection.execute(f"DELETE FROM {MARKS} WHERE move_id = $1", move_id)


async def test_servers_find_out_soon_that_the_machine_of_a_mover_is_lost(slots: Slots) -> None:
    """Until then the move is nobody else's."""
    async with database(slots.cluster.catalog_dsn(owner=True)) as catalog:
        move_id = await catalog.fetchval(_STALE_MOVE, 0, 0, "shard-0", "shard-1", Step.ROLLED_BACK.value)
    settings = MoverSettings.model_validate(mover.settings(slots.cluster.plan()))
    async with (
        leased(settings, move_id) as (lease, _),
        side.opened("shard-0", settings.shard_dsn("shard-0"), move_id) as shard,
    ):
        connections: tuple[Connection, ...] = (lease, shard.connection)
        for connection in connections:
            idle, interval, count, timeout = [
                int(await connection.fetchval("SELECT setting FROM pg_settings WHERE name = $1", name))
                for name in NOTICE_LOSS
            ]
            assert 0 < idle + interval * count <= 15
            assert 0 < timeout <= 15_000


async def test_a_fence_is_looked_after_for_as_long_as_no_shard_says_that_it_takes_writes(slots: Slots) -> None:
    """Whatever step is recorded by then: a mover may die between the two."""
    first = next(owned.first for owned in (await slots.topology()).ranges if owned.shard_id == "shard-0")
    async with (
        database(slots.cluster.catalog_dsn(owner=True)) as connection,
        database(slots.cluster.shard_dsn("shard-0", owner=True)) as source,
    ):
        for step in (Step.PLANNED, Step.VERIFYING, Step.ROLLING_BACK):
            await source.execute(_SET_STATE, first, "fenced")
            move_id = await connection.fetchval(_STALE_MOVE, first, first, "shard-0", "shard-1", step.value)
            await connection.execute(_SET_FENCED_AT, move_id)

            async def is_written() -> bool:
                return not await source.fetchval(_COUNT_FENCED) and await settled(slots)

            await eventually(is_written, within_s=15)
            assert (await catalog_moves.read_move(connection, move_id)).step is step
            await slots.move("rollback", "--move", str(move_id))
    assert await slots.left_over() == []
