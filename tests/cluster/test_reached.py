"""How far standbys are, asked once their primary is gone: what is decided by it must not be less than is on disk."""

import asyncio

from local import replication
from local.standby_settings import PRIMARY_CONNINFO
from tests.support.eventually import eventually
from tests.support.replicated import Node, replicated

RECEIVED = "SELECT (pg_last_wal_receive_lsn() - '0/0')::bigint"
FLUSHED = "SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint"
# Longer than any test.
DELAY = "1h"


async def test_one_that_was_started_again_counts_once_it_has_replayed_all_that_it_has() -> None:
    async with replicated("b", "c") as servers:
        primary, slow, lone = servers.primary, servers.standby, servers.nodes["c"]
        await primary.execute("CREATE TABLE t AS SELECT 1 AS x")
        flushed = await primary.fetchval(FLUSHED)
        for node in (slow, lone):
            await eventually(lambda node=node, lsn=flushed: _has(node, lsn))  # type: ignore[misc]
            # Commits are replayed no earlier than this after they were made: a replay that takes its time.
            await _delay(node, DELAY)
        # One cannot ask anybody for more, as one that was appointed and is to be promoted.
        await lone.execute(f"ALTER SYSTEM SET {PRIMARY_CONNINFO} = ''")
        await primary.execute("INSERT INTO t VALUES (2)")
        await primary.execute("INSERT INTO t VALUES (3)")
        expected = await primary.fetchval(FLUSHED)
        await asyncio.gather(*(eventually(lambda node=node: _has(node, expected)) for node in (slow, lone)))  # type: ignore[misc]
        for node in (slow, lone, primary):
            await node.kill()
        await asyncio.gather(slow.start(), lone.start())
        both, secrets = [slow.server, lone.server], primary.secrets
        assert await replication.reached(both, secrets, within_s=1.0) == {}
        asked = asyncio.create_task(replication.reached(both, secrets, within_s=30))
        await asyncio.gather(*(_delay(node, "0") for node in (slow, lone)))
        reached = await asked
        assert {name: progress.lsn >= expected for name, progress in reached.items()} == {"b": True, "c": True}


async def _has(node: Node, lsn: int) -> bool:
    return int(await node.fetchval(RECEIVED)) >= lsn


async def _delay(node: Node, by: str) -> None:
    await node.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{by}'")
    await node.execute("SELECT pg_reload_conf()")
    await eventually(lambda: _is_delayed(node, by))


async def _is_delayed(node: Node, by: str) -> bool:
    return bool(await node.fetchval("SELECT current_setting('recovery_min_apply_delay')") == by)
