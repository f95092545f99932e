"""Shards and moves by the commands that people use, and a catalog that was lost."""

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import yaml

from common.moves import Step
from local import mover as local_mover
from local.postgres import SUPERUSER
from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import database, user_slot

_MEMSHARD = str(Path(sys.executable).parent / "memshard")
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


async def test_a_fence_is_taken_away_where_there_is_no_supervisor_too() -> None:
    """By `recover --every`, as elsewhere. It outlives a catalog that does not answer, and ends when it is told to."""
    async with LocalCluster(shards=2) as cluster:
        await _store(cluster)
        slots = Slots(cluster, {"rollback_window_s": 0})
        cluster.kill("supervisor")
        async with slots.mover("recover", "--every", "0.2") as recovery:
            async with database(cluster.catalog_dsn(owner=True)) as catalog:
                await catalog.execute("ALTER TABLE moves RENAME TO away")
                await recovery.logged("fences could not be looked after")
                await catalog.execute("ALTER TABLE away RENAME TO moves")
            async with (
                slots.mover("move", "--first", "8192", "--last", "8999", "--to", "shard-0") as mover,
                slots.fence_held(mover, "shard-1", "shard-0"),
            ):
                assert await slots.fenced("shard-1") == 808
                mover.send(signal.SIGKILL)
                await mover.process.communicate()
                await eventually(lambda: _is_unfenced(slots), within_s=10)
            assert (await slots.moves())[-1].step is Step.VERIFYING
            recovery.send(signal.SIGTERM)
            events = [event async for event in recovery.events()]
            assert events[-1]["event"] == "done"
        assert await _all_there(cluster)
        await slots.move("resume")
        assert await slots.left_over() == []
        await cluster.up()


async def test_a_lost_catalog_is_made_again_where_there_is_no_supervisor_too(tmp_path: Path) -> None:
    """By the commands of docs/runbooks/bring-back-a-lost-catalog.md, "Elsewhere", in their order."""
    async with LocalCluster(shards=2) as cluster:
        await _store(cluster)
        before, plan = await Slots(cluster, {}).topology(), cluster.plan()
        for name in ("supervisor", "router-0", "shard-0", "shard-1"):
            cluster.kill(name)
        admin = plan.catalog_server().dsn(SUPERUSER, plan.secrets.postgres, "postgres")
        async with database(admin) as connection:
            await connection.execute("DROP DATABASE memshard_catalog WITH (FORCE)")
        environment = {
            "MEMSHARD_OWNER_PASSWORD": plan.secrets.memshard_owner,
            "MEMSHARD_APP_PASSWORD": plan.secrets.memshard_app,
            "MEMSHARD_MOVER_PASSWORD": plan.secrets.memshard_mover,
            "MEMSHARD_ADMIN_DSN": admin,
            "MEMSHARD_CATALOG_DSN": cluster.catalog_dsn(owner=True),
            "MEMSHARD_MOVER_CATALOG_DSN": cluster.catalog_dsn(owner=True),
            "MEMSHARD_MOVER_SHARD_DSNS": json.dumps(local_mover.settings(plan)["shard_dsns"]),
        }
        description = tmp_path / "cluster.yaml"
        shards = {shard.shard_id: {"address": shard.address} for shard in before.shards}
        description.write_text(yaml.safe_dump({"embedder": "local", "dimensions": 256, "shards": shards}))
        await _run(environment, _MEMSHARD, "database", "prepare", "catalog")
        named = [f"--shard={shard.shard_id}={shard.address}" for shard in before.shards]
        told = await _run(environment, sys.executable, "-P", "-m", "shard.mover", "rebuild", *named)
        assert json.loads(told)["event"] == "done"
        assert "was there" in await _run(environment, _MEMSHARD, "catalog", "create", str(description))
        await cluster.up()
        after = await Slots(cluster, {}).topology()
        assert (after.ranges, after.epoch > before.epoch) == (before.ranges, True)
        assert await _all_there(cluster)
        await Slots(cluster, {"rollback_window_s": 0}).move("move", "--first", "0", "--last", "99", "--to", "shard-1")
        assert await _all_there(cluster)


async def _run(environment: dict[str, str], *arguments: str) -> str:
    """A command that must succeed; what it printed."""
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def _is_unfenced(slots: Slots) -> bool:
    return await slots.fenced("shard-1") == 0


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
