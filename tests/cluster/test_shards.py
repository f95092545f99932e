"""Shards and moves by the commands that people use, and a catalog that was lost."""

import json
import shutil
import signal

from common.moves import Step
from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import user_slot

_USERS = [f"kept-{number}" for number in range(30)]


async def _store(cluster: LocalCluster) -> None:
    async with AsyncMemoryClient(cluster.address) as client:
        for user in _USERS:
            await client.store(user, f"{user} drinks green tea")


async def _all_there(cluster: LocalCluster) -> bool:
    async with AsyncMemoryClient(cluster.address) as client:
        for user in _USERS:
            found = await client.list_memories(user)
            assert [memory.content for memory in found.memories] == [f"{user} drinks green tea"]
    return True


def _scraped(cluster: LocalCluster) -> set[str]:
    """The services that Prometheus is told of."""
    return {target["labels"]["service"] for target in json.loads(cluster.layout.metrics_targets.read_text())}


async def test_a_shard_comes_serves_and_leaves_and_none_has_its_name_again() -> None:
    async with LocalCluster(shards=2, replicas=1) as cluster:
        await _store(cluster)
        slots = Slots(cluster, {})
        output = await cluster.run("shards", "add")
        assert "shard-2 serves" in output
        assert {"shard-2", "shard-2-replica-1"} <= _scraped(cluster)
        planned = await cluster.run("rebalance", "--plan")
        assert "5,461 slots are to be moved" in planned
        output = await cluster.run("rebalance", "--rollback-window", "0")
        assert "done" in output
        listed = json.loads(await cluster.run("shards", "list", "--json"))
        assert sorted(shard["slots"] for shard in listed["shards"]) == [5461, 5461, 5462]
        await eventually(cluster.healthy, within_s=30)
        assert await _all_there(cluster)
        # It is one like the others, after a restart too.
        await cluster.down()
        await cluster.up()
        assert await _all_there(cluster)
        code, refused = await command("shards", "remove", "shard-2", "--data-dir", str(cluster.data_dir))
        assert (code, "drain" in refused) == (1, True)
        await cluster.run("shards", "drain", "shard-2", "--rollback-window", "0")
        await cluster.run("shards", "remove", "shard-2")
        assert await _all_there(cluster)
        assert not any("shard-2" in process["name"] for process in (await cluster.status())["processes"])
        assert not list(cluster.layout.postgres.glob("postgres-shard-2*"))
        assert _scraped(cluster) == {
            "router-0",
            *(f"shard-{n}{suffix}" for n in (0, 1) for suffix in ("", "-replica-1")),
        }
        await cluster.run("shards", "add")
        assert [shard.shard_id for shard in (await slots.topology()).shards] == ["shard-0", "shard-1", "shard-3"]
        assert await slots.left_over() == []


async def test_a_pinned_user_is_where_he_is_pinned() -> None:
    async with LocalCluster(shards=2) as cluster:
        await _store(cluster)
        slots = Slots(cluster, {})
        topology = await slots.topology()
        whale = next(user for user in _USERS if topology.owner(user_slot(user)).shard_id == "shard-0")
        await cluster.run("shards", "pin", "--user", whale, "--shard", "shard-1")
        await cluster.run("rebalance", "--rollback-window", "0")
        assert (await slots.topology()).owner(user_slot(whale)).shard_id == "shard-1"
        assert await _all_there(cluster)
        await cluster.run("shards", "unpin", "--user", whale)
        await cluster.run("rebalance", "--rollback-window", "0")
        topology = await slots.topology()
        assert [topology.slot_count(shard.shard_id) for shard in topology.shards] == [8192, 8192]


async def test_a_fence_that_a_killed_mover_left_is_taken_away() -> None:
    async with LocalCluster(shards=2) as cluster:
        await _store(cluster)
        slots = Slots(cluster, {"rollback_window_s": 0})
        async with slots.mover("move", "--first", "8192", "--last", "9000", "--to", "shard-0") as mover:
            await mover.until(Step.FENCED)
            mover.send(signal.SIGKILL)
            await mover.process.communicate()

        async def nobody_waits() -> bool:
            return not any("fenced" in left for left in await slots.left_over())

        async def recovered() -> bool:
            return (await slots.moves())[-1].step is not Step.FENCED and await nobody_waits()

        await eventually(recovered, within_s=30)
        assert await _all_there(cluster)
        output = await cluster.run("moves", "resume")
        assert "done" in output
        assert await slots.left_over() == []
        assert await cluster.run("moves", "list") == "No move is open.\n"


async def test_a_lost_catalog_is_made_again_from_the_shards() -> None:
    async with LocalCluster(shards=2, replicas=1) as cluster:
        await _store(cluster)
        slots = Slots(cluster, {"rollback_window_s": 0})
        await slots.move("move", "--first", "100", "--last", "300", "--to", "shard-1")
        # In the middle of one more.
        async with slots.mover("move", "--first", "1000", "--last", "3000", "--to", "shard-1") as mover:
            await mover.until(Step.REVERSING)
            mover.send(signal.SIGKILL)
            await mover.process.communicate()
        before = await slots.topology()
        await cluster.run("failover", "shard-0")
        primary = cluster.primary("shard-0")
        await cluster.down()
        shutil.rmtree(cluster.plan().catalog_server().pgdata)
        output = await cluster.run("catalog", "rebuild")
        assert "The catalog is made again" in output
        assert f"{primary} is the primary of shard-0" in output
        await cluster.up()
        after = await slots.topology()
        assert after.epoch > before.epoch
        assert after.ranges == before.ranges
        assert await _all_there(cluster)
        assert await slots.left_over() == []
        await eventually(cluster.healthy, within_s=30)
        await _store(cluster)
