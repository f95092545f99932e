"""The runbooks walked on the embedded cluster: what a page has people type, in its order, and what has come of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.unit.cli.test_runbooks import RUNBOOKS, commands_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_CONTENTS = {f"user-{number}": f"user-{number} drinks tea" for number in range(40)}
# They ask a router, and know of no data directory.
_CLIENTS = ("add", "search")
# Ranges can be brought back for half a minute, and the commands end after that.
_COMMAND_TIMEOUT_S = 120.0


def page(name: str, until: str, tmp_path: Path) -> Iterator[list[str]]:
    """The memshard commands of a page, up to a heading."""
    text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert until in text
    begin = tmp_path / f"{name}.md"
    begin.write_text(text.partition(until)[0], encoding="utf-8")
    return (words[1:] for words, _ in commands_of(begin) if words[0] == "memshard")


async def typed(cluster: LocalCluster, words: list[str]) -> str:
    """What a command prints, which must succeed; but `status` may find fault."""
    where = ("--address", cluster.address) if words[0] in _CLIENTS else ("--data-dir", str(cluster.data_dir))
    code, output = await command(*words, *where, timeout_s=_COMMAND_TIMEOUT_S)
    assert code == 0 or words == ["status"], output
    return output


async def walk(cluster: LocalCluster, commands: Iterator[list[str]]) -> None:
    """Types them, one after the other."""
    for words in commands:
        await typed(cluster, words)


async def shards(cluster: LocalCluster) -> dict[str, dict[str, Any]]:
    """What `status` says of each shard, whether or not it finds fault."""
    _, output = await command("status", "--json", "--data-dir", str(cluster.data_dir), timeout_s=_COMMAND_TIMEOUT_S)
    return {shard["shard_id"]: shard for shard in json.loads(output)["shards"]}


async def slots(cluster: LocalCluster) -> dict[str, int]:
    """How many slots each shard has."""
    return {shard_id: shard["slots"] for shard_id, shard in (await shards(cluster)).items()}


async def store(cluster: LocalCluster) -> None:
    async with AsyncMemoryClient(cluster.address, timeout_s=30) as client:
        for user, content in _CONTENTS.items():
            await client.store(user, content)


async def is_all_there(cluster: LocalCluster) -> bool:
    async with AsyncMemoryClient(cluster.address, timeout_s=30) as client:
        for user, content in _CONTENTS.items():
            found = [memory.content async for memory in client.iter_memories(user)]
            if found != [content]:
                return False
    return True


async def test_a_shard_is_added_and_drained_and_removed(tmp_path: Path) -> None:
    async with LocalCluster(shards=2, replicas=0) as cluster:
        await store(cluster)
        await walk(cluster, page("add-a-shard", "## Elsewhere", tmp_path))
        given = await slots(cluster)
        assert set(given) == {"shard-0", "shard-1", "shard-2"}
        assert max(given.values()) - min(given.values()) <= 1
        assert await is_all_there(cluster)
        await walk(cluster, page("drain-and-remove-a-shard", "## Elsewhere", tmp_path))
        assert set(await slots(cluster)) == {"shard-0", "shard-1"}
        assert await is_all_there(cluster)


async def test_a_dead_primary_is_replaced(tmp_path: Path) -> None:
    async with LocalCluster(shards=2, replicas=1) as cluster:
        await store(cluster)
        before, *after = page("replace-a-dead-primary", "## Kubernetes", tmp_path)
        await typed(cluster, before)
        cluster.kill("postgres-shard-0")

        async def has_taken_over() -> bool:
            return bool((await shards(cluster))["shard-0"]["primary"] == "postgres-shard-0-1")

        async def has_two_copies() -> bool:
            return all(shard["durability"] == "QUORUM" for shard in (await shards(cluster)).values())

        await eventually(has_taken_over, within_s=60)
        for words in after:
            if words[0] in ("failover", "health"):
                # The page shows the status to be well again before.
                await eventually(has_two_copies, within_s=60)
                await eventually(cluster.healthy, within_s=60)
            await typed(cluster, words)
        assert (await shards(cluster))["shard-0"]["primary"] == "postgres-shard-0"
        assert await is_all_there(cluster)


async def test_everything_is_replaced_one_by_one(tmp_path: Path) -> None:
    async with LocalCluster(shards=1, replicas=1) as cluster:
        await store(cluster)
        await typed(cluster, ["add", "--user", "alice", "Alice drinks green tea"])
        restart, of_a_bad_version, *checks = page("upgrade-with-no-downtime", "## Kubernetes", tmp_path)
        assert (restart, of_a_bad_version) == (["restart", "--all"], ["restart", "shard-0"])
        await typed(cluster, restart)
        for words in checks:
            output = await typed(cluster, words)
            assert "router-0 is healthy" in output or "Alice drinks green tea" in output
        assert await is_all_there(cluster)
