"""Moving slots between shards while they are written."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from common import catalog_moves
from common.moves import Step
from shard import purge
from shard.database import Database
from shard.moving.tables import MARKS, MOVED, STAYING
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.moving import Slots
from tests.support.wire import database, pool_of_one
from tests.support.writers import Writers

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


@pytest.mark.parametrize("asked", ["plan", "list"])
async def test_a_mover_says_what_it_would_do_and_what_was_done(slots: Slots, asked: str) -> None:
    events = await slots.move(asked)
    if asked == "plan":
        assert events[0] == {"event": "plan", "slots": 0, "moves": []}
    else:
        assert {move["step"] for move in events[-1]["moves"]} == {"done"}


async def samples(cluster: LocalCluster) -> dict[tuple[str, ...], float]:
    """What the router has on its page of moves: by name, and labels in the order of their names."""
    families = await families_of(cluster, "router-0")
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for name in ("memory_moves", "memory_moves_unattended", "memory_moving_slots")
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
    async with slots.mover("move", "--first", "0", "--last", "99", "--to", "shard-1") as running:
        await running.until("copying")
        running.send()
        await running.process.wait()
        await eventually(lambda: is_seen("copying", stopped=True), within_s=15)
        assert "100 slots  shard-0 → shard-1  stopped at copying" in await shown()
    patient = Slots(cluster, {"rollback_window_s": 600})
    async with patient.mover("resume") as running:
        await running.until("active")
        await eventually(lambda: is_seen("active", stopped=False), within_s=15)
        assert "100 slots  shard-0 → shard-1  active" in await shown()
    await slots.move("resume")

    async def is_over() -> bool:
        found = await samples(cluster)
        steps = {key: value - before[key] for key, value in found.items() if key[0] == "memory_moves"}
        return {key[1]: value for key, value in steps.items() if value} == {Step.DONE: 1}

    await eventually(is_over, within_s=15)
    assert not any(value for key, value in (await samples(cluster)).items() if key[0] != "memory_moves")
    assert await slots.left_over() == []


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
