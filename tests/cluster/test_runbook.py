"""A runbook walked as it stands: the commands are read from the page, in its order."""

import json

import pytest

from common.topology import Shard, ShardStatus
from memshard import AsyncMemoryClient, NewMemory
from tests.support.cluster import LocalCluster
from tests.support.moving import Slots
from tests.unit.cli.test_runbooks import RUNBOOKS, commands_of

_USERS = [f"kept-{number}" for number in range(30)]
_SHARD = "shard-2"


# The page has no --rollback-window: what is drained waits for as long as it does for anybody.
@pytest.mark.timeout(280)
async def test_a_shard_is_drained_and_removed_as_the_page_says() -> None:
    commands = [words for words, _ in commands_of(RUNBOOKS / "drain-and-remove-a-shard.md", "The embedded cluster")]
    assert [words[1:] for words in commands if _SHARD in words] == [
        ["shards", "drain", _SHARD],
        ["shards", "remove", _SHARD],
    ]
    async with LocalCluster(shards=3) as cluster, AsyncMemoryClient(cluster.address) as client:
        slots = Slots(cluster, {})
        stored = await client.store_many([NewMemory(user_id=user, content=f"of {user}") for user in _USERS])
        assert (await slots.topology()).slot_count(_SHARD) > 0
        status: dict[tuple[str, ...], dict[str, Shard]] = {}
        for words in commands:
            await cluster.run(*words[1:], timeout_s=200)
            status[tuple(words[1:3])] = {shard.shard_id: shard for shard in (await slots.topology()).shards}
        assert status["shards", "drain"][_SHARD].status is ShardStatus.DRAINING
        assert sorted(status["shards", "remove"]) == ["shard-0", "shard-1"]
        assert _SHARD not in json.dumps(await cluster.status())
        # What the last step is to show.
        assert await cluster.healthy()
        for user, outcome in zip(_USERS, stored.outcomes, strict=True):
            assert (await client.get(outcome.id, user_id=user)).content == f"of {user}"
        assert await slots.left_over() == []
