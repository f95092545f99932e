"""`memshard rotate-secrets`: the old passwords are good for nothing, and everything is there."""

import asyncio

import asyncpg
import pytest

from common import roles
from common.moves import Step
from common.roles import Login
from local.layout import write_atomically
from local.postgres import SUPERUSER
from local.record import Secrets, load_secrets
from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import database
from tests.support.writers import Writers

EMBEDDING = [1.0, 0.0, 0.0]


async def quorum(cluster: LocalCluster) -> bool:
    status = await cluster.status()
    return all(p["healthy"] for p in status["processes"]) and status["shards"][0]["durability"] == "QUORUM"


async def test_every_secret_is_a_new_one_and_nothing_else_has_changed() -> None:
    async with LocalCluster(shards=1, replicas=1, embedder="none", dimensions=3) as cluster:
        await eventually(lambda: quorum(cluster), within_s=60)
        before, token = load_secrets(cluster.layout), cluster.layout.admin_token.read_text()
        old_dsns = [cluster.catalog_dsn(), cluster.shard_dsn("shard-0"), cluster.shard_dsn("shard-0", owner=True)]
        old_dsns.append(cluster.plan().catalog_server().dsn(SUPERUSER, before.postgres))
        async with AsyncMemoryClient(cluster.address) as client:
            kept = (await client.store("alice", "before", embedding=EMBEDDING)).memory

        # An earlier rotation was cut off when it had changed the catalog's server.
        cut_off = Secrets.generate()
        write_atomically(cluster.layout.next_secrets, cut_off.model_dump_json(), durable=False)
        async with database(old_dsns[-1]) as connection:
            await roles.ensure_login(connection, Login(SUPERUSER, cut_off.postgres))

        output = await cluster.run("rotate-secrets")
        assert output.startswith("New passwords on postgres-catalog, postgres-shard-0.\n")
        after = load_secrets(cluster.layout)
        assert after == cut_off
        assert not cluster.layout.next_secrets.exists()
        for name in Secrets.model_fields:
            assert getattr(after, name) != getattr(before, name)
        assert not any(getattr(after, name) in output for name in Secrets.model_fields)
        for dsn in old_dsns:
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(dsn)

        await cluster.down()
        await cluster.up()
        await eventually(lambda: quorum(cluster), within_s=60)
        assert cluster.layout.admin_token.read_text() != token
        async with AsyncMemoryClient(cluster.address) as client:
            assert (await client.get(kept.id, user_id="alice")).content == "before"
            await client.store("alice", "after", embedding=EMBEDDING)
        # The catalog's, the shard's and the standby's servers have no other connections than with the new ones.
        _, output = await command("failover", "shard-0", "--data-dir", str(cluster.data_dir))
        assert "takes the writes of shard-0" in output


async def test_moves_that_are_open_go_on_with_the_new_password() -> None:
    """One that is to be brought back, and one that is just being copied: subscriptions keep the URL of their making."""
    users = [f"rotated-{number}" for number in range(40)]
    async with LocalCluster(shards=2) as cluster:
        slots = Slots(cluster, {"rollback_window_s": 3600, "max_slots": 16384})
        writers = Writers(cluster.address, users)
        for user in users:
            writers.expected[user] = {}
        async with AsyncMemoryClient(cluster.address) as client:

            async def store(content: str) -> None:
                for user in users:
                    stored = (await client.store(user, f"{user} {content}")).memory
                    writers.expected[user][stored.id] = stored.content

            await store("before")
            for first, last, step in ((8192, 12287, Step.ACTIVE), (12288, 16383, Step.VERIFYING)):
                asked = ("move", "--first", str(first), "--last", str(last), "--to", "shard-0")
                async with slots.step_held(step) as held, slots.mover(*asked) as mover:
                    await mover.until(step)
                    mover.send()
                    await mover.process.communicate()
                    await held.end_sessions()
            gone, begun = await slots.moves()
            await cluster.run("rotate-secrets")
            await cluster.down()
            await cluster.up()
            await store("after")
            assert [move.step for move in await slots.moves()] == [Step.ACTIVE, Step.VERIFYING]
            await asyncio.wait_for(slots.move("rollback", "--move", str(gone.move_id)), 60)
            await asyncio.wait_for(slots.move("resume", "--rollback-window", "0"), 60)
            assert [move.step for move in await slots.moves()] == [Step.ROLLED_BACK, Step.DONE]
            topology = await slots.topology()
            assert [topology.owner(move.first).shard_id for move in (gone, begun)] == ["shard-1", "shard-0"]
            assert await writers.found() == writers.expected
            assert await slots.left_over() == []


async def test_a_cluster_that_does_not_run_keeps_its_secrets() -> None:
    async with LocalCluster(shards=1, embedder="none", dimensions=3) as cluster:
        before = load_secrets(cluster.layout)
        await cluster.down()
        code, output = await command("rotate-secrets", "--data-dir", str(cluster.data_dir))
        assert code == 1
        assert "does not run: start it first" in output
        assert load_secrets(cluster.layout) == before
        assert not cluster.layout.next_secrets.exists()
