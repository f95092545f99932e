"""Comparing all that there is with all that its writers were told: by listing, by id, in the databases of all shards,
and by searching. Nothing is written meanwhile, and nothing is open.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from memshard import AlreadyExists, AsyncMemoryClient, ReadLevel
from tests.support.brute_force import BruteForce, assert_same
from tests.support.cluster import LocalCluster
from tests.support.history import History, found_of
from tests.support.wire import database
from tests.support.writers import Writers

# Side by side, of all that there is.
_CHECKERS = 8
_MEMORIES = """
SELECT id::text AS id, user_id, version, deleted_at IS NOT NULL AS deleted, content,
       CASE WHEN deleted_at IS NULL THEN embedding::text END AS embedding
FROM memories WHERE user_id = ANY ($1::text[])
"""
_VERSIONS = """
SELECT id::text AS id, array_agg(version ORDER BY version) AS versions,
       array_agg(DISTINCT content <> '') AS readable
FROM memory_versions WHERE user_id = ANY ($1::text[]) GROUP BY id
"""
_REQUESTS = """
SELECT user_id FROM applied_requests WHERE user_id = ANY ($1::text[])
"""


async def check_everything(
    cluster: LocalCluster, writers: Writers, *, fetches: int | None = None, searches: int = 40
) -> int:
    """Compares what there is of the writers' users; how many memories they have. Each has `fetches` of his fetched by
    id, or all of them; `searches` are made among one user's memories, and as many among all.

    What a read has wrong is counted in the histories; AssertionError: for what the databases or a search have wrong.
    """
    chance = random.Random(len(writers.writes.times))
    async with AsyncMemoryClient(cluster.address, timeout_s=60) as client:

        async def check(users: Sequence[str]) -> None:
            for user in users:
                history = writers.histories[user]
                assert not history.given_up()
                listed = [memory async for memory in client.iter_memories(user, read=ReadLevel.STRONG)]
                history.check(map(found_of, listed), whole=True, since=history.moment())
                some = listed if fetches is None else chance.sample(listed, min(fetches, len(listed)))
                fetched = [await client.get(memory.id, user_id=user, read=ReadLevel.STRONG) for memory in some]
                history.check(map(found_of, fetched), whole=fetches is None, since=history.moment())

        await asyncio.gather(*(check(writers.users[number::_CHECKERS]) for number in range(_CHECKERS)))
        await _check_repetitions(client, writers)
        stored = await _check_databases(cluster, writers.histories)
        everything = BruteForce(stored)
        for user in chance.sample(writers.users, min(searches, len(writers.users))):
            for whose in (user, None):
                query = [chance.gauss(number, 0.05) for number in chance.choice(list(stored.values()))[1]]
                found = await client.search(embedding=query, user_id=whose, limit=50, require_all_shards=True)
                assert_same(found.results, everything.ranking(query, whose), 50)
    return len(stored)


def wrong(writers: Writers) -> Counter[str]:
    """What reads had wrong, of all users."""
    return sum((history.wrong for history in writers.histories.values()), Counter[str]())


async def _check_repetitions(client: AsyncMemoryClient, writers: Writers) -> None:
    """What was answered to a request id is answered to it again, and the id of what was deleted is still taken. That
    nothing is changed by it is for the databases to say.
    """
    for user, last in writers.answered.items():
        if (changed := last.get("update")) is not None and changed.content is not None:
            again = await client.update(user, changed.memory_id, content=changed.content, request_id=changed.request_id)
            assert again.memory.version == changed.answer
        if (gone := last.get("delete")) is not None:
            assert (await client.delete(user, gone.memory_id, request_id=gone.request_id)).deleted == gone.answer
            with pytest.raises(AlreadyExists):
                await client.store(user, "another with its id", id=gone.memory_id)


async def _check_databases(
    cluster: LocalCluster, histories: Mapping[str, History]
) -> dict[str, tuple[str, list[float]]]:
    """Each memory is in one shard, at the version that was acknowledged and with those before it; each that was deleted
    is a tombstone, and so are its versions; and each change has left its request id. Every memory's user and embedding.
    """
    users = list(histories)
    there: dict[str, tuple[str, int, bool, str]] = {}
    versions: dict[str, tuple[list[int], list[bool]]] = {}
    requests: Counter[str] = Counter()
    stored: dict[str, tuple[str, list[float]]] = {}
    for shard_id in cluster.plan().record.shard_ids():
        async with database(cluster.shard_dsn(shard_id)) as connection:
            for row in await connection.fetch(_MEMORIES, users):
                assert row["id"] not in there, "two shards have one memory"
                there[row["id"]] = row["user_id"], row["version"], row["deleted"], row["content"]
                if not row["deleted"]:
                    stored[row["id"]] = row["user_id"], json.loads(row["embedding"])
            for row in await connection.fetch(_VERSIONS, users):
                assert row["id"] not in versions, "two shards have versions of one memory"
                versions[row["id"]] = row["versions"], row["readable"]
            applied = await connection.fetch(_REQUESTS, users)
            requests.update(row["user_id"] for row in applied)
    acknowledged: dict[str, tuple[str, int, bool, str]] = {}
    kept: dict[str, tuple[list[int], list[bool]]] = {}
    for user, history in histories.items():
        for one, memory in history.memories.items():
            # A deletion is a change, and makes no version: it empties the last.
            last = memory.version if memory.content is not None else memory.version - 1
            acknowledged[one] = user, last, memory.content is None, memory.content or ""
            if memory.version > 1:
                kept[one] = list(range(1, memory.version)), [memory.content is not None]
    assert there == acknowledged
    assert versions == kept
    assert requests == Counter({user: changes for user, history in histories.items() if (changes := _changes(history))})
    return stored


def _changes(history: History) -> int:
    return sum(memory.version - 1 for memory in history.memories.values())
