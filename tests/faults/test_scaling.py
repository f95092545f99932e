"""Shards come, slots move to them and back, and shards leave, while everybody writes and reads."""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from common.moves import Step
from memshard import AsyncMemoryClient, Memory, MemshardError, NewMemory, ReadLevel
from tests.support.brute_force import BruteForce, assert_same
from tests.support.cluster import LocalCluster
from tests.support.history import Found
from tests.support.moving import Slots
from tests.support.wire import database
from tests.support.writers import Writers

_MOVE_TIMEOUT_S = 1200.0
# A reader lists everything that a user has, and searches it, once in so many times.
_WHOLE_EVERY = 10
# Side by side, of all that there is in the end.
_CHECKERS = 8
# Users whose memories are searched for in the end, and as often among everybody's.
_SEARCHES = 40
_VECTORS = """
SELECT id::text AS id, user_id, embedding::text AS embedding FROM memories
WHERE deleted_at IS NULL AND user_id = ANY ($1::text[])
"""


@dataclass(frozen=True)
class Scale:
    """How much there is."""

    users: int
    memories: int
    writers: int
    readers: int
    replicas: int


SHORT = Scale(users=24, memories=20, writers=4, readers=2, replicas=0)
FULL = Scale(users=100, memories=500, writers=8, readers=8, replicas=1)


@dataclass
class Readers:
    """Callers that list and search what others write, and compare it with what its writers were told."""

    writers: Writers
    reads: int = 0
    failures: list[MemshardError] = field(default_factory=list)
    incomplete: int = 0
    stop: bool = False

    async def run(self, count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._read(self.writers.users[number::count], number))

    async def _read(self, users: list[str], number: int) -> None:
        level = (ReadLevel.STRONG, ReadLevel.SESSION, ReadLevel.EVENTUAL)[number % 3]
        async with AsyncMemoryClient(self.writers.address) as client:
            for turn, user in enumerate(itertools.cycle(users)):
                whole = turn % _WHOLE_EVERY == 0
                try:
                    await self._listed(client, user, level, whole=whole)
                    await self._searched(client, None, level)
                    self.reads += 2
                    if whole:
                        await self._searched(client, user, level)
                        self.reads += 1
                except MemshardError as error:
                    self.failures.append(error)
                if self.stop:
                    return
                await asyncio.sleep(0.005)

    async def _listed(self, client: AsyncMemoryClient, user: str, level: ReadLevel, *, whole: bool) -> None:
        history = self.writers.histories[user]
        since = history.moment()
        if whole:
            memories = [memory async for memory in client.iter_memories(user, read=level)]
        else:
            memories = list((await client.list_memories(user, page_size=20, read=level)).memories)
        # This session has written nothing, so that a replica may answer it with what was.
        history.check(map(_found, memories), whole=whole, since=since, fresh=level is ReadLevel.STRONG)

    async def _searched(self, client: AsyncMemoryClient, user: str | None, level: ReadLevel) -> None:
        """With a user by the level; of all users, what was ever asked for."""
        histories = self.writers.histories
        since = histories[user].moment() if user else {}
        answer = await client.search("what is remembered?", user_id=user, limit=5, read=level if user else None)
        self.incomplete += answer.report.partial
        memories = [result.memory for result in answer.results]
        for owner in {memory.user_id for memory in memories}:
            theirs = [_found(memory) for memory in memories if memory.user_id == owner]
            fresh = owner == user and level is ReadLevel.STRONG
            histories[owner].check(theirs, whole=False, since=since if fresh else {}, fresh=fresh)


def _found(memory: Memory) -> Found:
    return Found(memory.id, memory.content, memory.version)


async def _stored(address: str, users: list[str], count: int) -> dict[str, dict[str, str]]:
    """What each user has to begin with, by id."""
    expected: dict[str, dict[str, str]] = {}
    async with AsyncMemoryClient(address, timeout_s=60) as client:
        for user in users:
            memories = [NewMemory(user_id=user, content=f"{user} knew {number}") for number in range(count)]
            result = await client.store_many(memories)
            ids = [outcome.id for outcome in result.outcomes]
            expected[user] = {one: memory.content for one, memory in zip(ids, memories, strict=True)}
    return expected


@dataclass
class Moved:
    """What the moves told."""

    ranges: int = 0
    pauses_ms: list[float] = field(default_factory=list)
    """Of all fences, those that were given up included."""
    given_up: int = 0


async def _grown_and_shrunk(slots: Slots) -> Moved:
    """From two shards to four and back, by the commands that people use."""
    cluster = slots.cluster
    moved = Moved()

    async def run(*arguments: str) -> None:
        output = await cluster.run(*arguments, "--json", "--rollback-window", "0", timeout_s=_MOVE_TIMEOUT_S)
        states = [json.loads(line).get("state", {}) for line in output.splitlines()]
        paused = [state for state in states if "pause_ms" in state]
        moved.pauses_ms += [state["pause_ms"] for state in paused]
        moved.given_up += sum(state["move"]["step"] == Step.VERIFYING for state in paused)
        moved.ranges += sum(state.get("move", {}).get("step") == Step.DONE for state in states)

    for _ in range(2):
        await cluster.run("shards", "add")
    await run("rebalance")
    counts = [(await slots.topology()).slot_count(f"shard-{number}") for number in range(4)]
    assert counts == [4096] * 4
    for shard_id in ("shard-2", "shard-3"):
        await run("shards", "drain", shard_id)
        await cluster.run("shards", "remove", shard_id)
    return moved


async def _vectors(cluster: LocalCluster, users: list[str]) -> dict[str, tuple[str, list[float]]]:
    """Every stored embedding with its user by memory, as the databases of all shards have them: each once."""
    stored: dict[str, tuple[str, list[float]]] = {}
    for shard_id in cluster.plan().record.shard_ids():
        async with database(cluster.shard_dsn(shard_id)) as connection:
            for row in await connection.fetch(_VECTORS, users):
                assert row["id"] not in stored, "two shards have one memory"
                stored[row["id"]] = row["user_id"], json.loads(row["embedding"])
    return stored


async def _check_the_end(cluster: LocalCluster, writers: Writers) -> int:
    """Compares all that there is with all that was acknowledged: by listing, by id, in the databases, and by searching;
    how many memories there are.
    """
    async with AsyncMemoryClient(cluster.address, timeout_s=60) as client:

        async def check(users: list[str]) -> None:
            for user in users:
                history = writers.histories[user]
                listed = [memory async for memory in client.iter_memories(user, read=ReadLevel.STRONG)]
                history.check(map(_found, listed), whole=True, since=history.moment())
                fetched = [await client.get(memory.id, user_id=user, read=ReadLevel.STRONG) for memory in listed]
                history.check(map(_found, fetched), whole=True, since=history.moment())

        await asyncio.gather(*(check(writers.users[number::_CHECKERS]) for number in range(_CHECKERS)))
        stored = await _vectors(cluster, writers.users)
        acknowledged = {one: user for user, history in writers.histories.items() for one in history.live()}
        assert {one: user for one, (user, _) in stored.items()} == acknowledged
        everything, chance = BruteForce(stored), random.Random(len(stored))
        for user in chance.sample(writers.users, min(_SEARCHES, len(writers.users))):
            for whose in (user, None):
                query = [chance.gauss(number, 0.05) for number in chance.choice(list(stored.values()))[1]]
                found = await client.search(embedding=query, user_id=whose, limit=50, require_all_shards=True)
                assert_same(found.results, everything.ranking(query, whose), 50)
    return len(stored)


@pytest.mark.parametrize(
    "scale", [SHORT, pytest.param(FULL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["short", "full"]
)
@pytest.mark.timeout(280)
async def test_two_shards_become_four_and_two_again_under_load(
    scale: Scale, record: Callable[[str, str, str], None]
) -> None:
    users = [f"user-{number}" for number in range(scale.users)]
    async with LocalCluster(shards=2, replicas=scale.replicas) as cluster:
        slots = Slots(cluster, {})
        writers = Writers(cluster.address, users, await _stored(cluster.address, users, scale.memories))
        writers.pause_s = 0.01
        readers = Readers(writers)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            load = [group.create_task(writers.run(scale.writers)), group.create_task(readers.run(scale.readers))]
            try:
                moved = await _grown_and_shrunk(slots)
            finally:
                writers.stop()
                readers.stop = True
            await asyncio.wait(load)
        elapsed_s = time.monotonic() - began
        found = await writers.found()
        assert (await slots.topology()).serving() == tuple(s for s in (await slots.topology()).shards)
        lost = sum(found[user].get(one) != mine[one] for user, mine in writers.expected.items() for one in mine)
        doubled = sum(len(found[user].keys() - mine.keys()) for user, mine in writers.expected.items())
        memories = await _check_the_end(cluster, writers)
        wrong = sum((history.wrong for history in writers.histories.values()), Counter[str]())
        pauses = moved.pauses_ms
        p99 = statistics.quantiles(pauses, n=100)[98] if len(pauses) > 1 else max(pauses)
        measured = (
            f"{len(writers.writes.times)} writes and {readers.reads} reads in {elapsed_s:.0f} s: {lost} lost, "
            f"{doubled} doubled, {len(writers.failures) + len(readers.failures)} failed, {wrong.total()} read wrongly, "
            f"all of {memories} memories there by listing, id and brute force; {moved.ranges} ranges, pause p50 "
            f"{statistics.median(pauses):.0f} ms, p99 {p99:.0f} ms, {moved.given_up} of {len(pauses)} fences given up, "
            f"slowest write {writers.slowest_s * 1000:.0f} ms"
        )
        record("2 to 4 shards and back under load", "0 lost, doubled, failed; pause p99 < 500 ms", measured)
        print(measured, [str(error) for error in (*writers.failures, *readers.failures)][:5])
        assert (lost, doubled, writers.wrong, wrong, readers.incomplete) == (0, 0, [], {}, 0)
        assert (writers.failures, readers.failures) == ([], [])
        assert await slots.left_over() == []
        assert p99 < 500
