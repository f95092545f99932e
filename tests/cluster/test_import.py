"""Conversations go in once, and agents find them again, each in its own."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from memshard import AsyncMemoryClient
from tests.support.cluster import LocalCluster, command

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "two-friends.json"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running() -> AsyncIterator[LocalCluster]:
    async with LocalCluster(shards=3) as cluster:
        yield cluster


async def memshard(cluster: LocalCluster, *arguments: str) -> str:
    code, output = await command(*arguments, "--address", cluster.address)
    assert code == 0, output
    return output


async def everything(cluster: LocalCluster, *users: str) -> dict[str, list[str]]:
    async with AsyncMemoryClient(cluster.address) as client:
        return {user: [memory.content async for memory in client.iter_memories(user)] for user in users}


async def test_a_conversation_imported_twice_is_stored_once(running: LocalCluster) -> None:
    for _ in range(2):
        await memshard(running, "import", str(EXAMPLE))
    stored = await everything(running, "two-friends", "gardeners")
    assert sorted(map(len, stored.values())) == [2, 5]


async def test_a_search_answers_from_the_users_own_conversation_only(running: LocalCluster) -> None:
    await memshard(running, "import", str(EXAMPLE))
    question = ("search", "When do the tomatoes go out?", "--limit", "50", "--json")
    mine = json.loads(await memshard(running, *question, "--user", "two-friends"))
    assert len(mine["results"]) == 5
    assert {result["memory"]["user_id"] for result in mine["results"]} == {"two-friends"}
    anyones = json.loads(await memshard(running, *question))
    assert "tomatoes" in anyones["results"][0]["memory"]["content"]
    turn = anyones["results"][0]["memory"]["metadata"]
    assert (turn["speaker"], turn["dia_id"]) == ("Petra", "D1:1")


async def test_json_lines_imported_twice_are_stored_once_and_bad_ones_sink_nobody(
    running: LocalCluster, tmp_path: Path
) -> None:
    lines = [{"user_id": "lines", "content": f"line {n}", "importance": n / 100} for n in range(40)]
    bad = ['{"user_id": "lines"}', "not json", '{"user_id": "lines", "content": "x", "importance": 7}']
    file = tmp_path / "memories.jsonl"
    file.write_text("\n".join([*bad, *map(json.dumps, lines)]) + "\n")
    for _ in range(2):
        code, output = await command("import", str(file), "--address", running.address)
        assert code == 1
        assert all(f"line {number}" in output for number in (1, 2, 3)), output
        assert "importance" in output
    assert sorted((await everything(running, "lines"))["lines"]) == sorted(line["content"] for line in lines)  # type: ignore[type-var]


async def test_what_was_deleted_is_not_said_to_be_stored_again(running: LocalCluster, tmp_path: Path) -> None:
    """A late retry must bring nothing back; and whoever meant a new store must hear that there is none."""
    file = tmp_path / "memories.jsonl"
    file.write_text("".join(f'{{"user_id": "regret", "content": "line {n}"}}\n' for n in range(3)))
    await memshard(running, "import", str(file))
    listed = json.loads(await memshard(running, "list", "--user", "regret", "--json"))
    gone = next(memory for memory in listed if memory["content"] == "line 1")
    await memshard(running, "delete", gone["id"], "--user", "regret")
    code, output = await command("import", str(file), "--address", running.address)
    assert code == 1
    assert "2 memories are stored. Not stored: 1 deleted within the last 24 hours." in output
    code, output = await command(
        *("add", "--user", "again", "--id", "0190b5a4-7b3c-7def-8123-456789abcdef", "once"),
        *("--address", running.address),
    )
    assert code == 0
    await memshard(running, "delete", "0190b5a4-7b3c-7def-8123-456789abcdef", "--user", "again")
    code, output = await command(
        *("add", "--user", "again", "--id", "0190b5a4-7b3c-7def-8123-456789abcdef", "once"),
        *("--address", running.address),
    )
    assert code == 1
    assert "was deleted within the last 24 hours and is not stored again" in output
