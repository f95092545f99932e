"""Shards come, slots move to them and back, and shards leave, while everybody writes and reads."""

import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from common.moves import Step
from memshard import AsyncMemoryClient, NewMemory
from tests.support.cluster import LocalCluster
from tests.support.end_state import check_everything, wrong
from tests.support.moving import Slots
from tests.support.readers import Readers
from tests.support.writers import Writers

_MOVE_TIMEOUT_S = 1200.0


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


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(SHORT, marks=pytest.mark.timeout(280)),
        pytest.param(FULL, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=["short", "full"],
)
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
        memories, mistakes = await check_everything(cluster, writers), wrong(writers)
        pauses = moved.pauses_ms
        p99 = sorted(pauses)[math.ceil(0.99 * len(pauses)) - 1]
        measured = (
            f"{len(writers.writes.times)} writes and {readers.reads} reads in {elapsed_s:.0f} s: {lost} lost, "
            f"{doubled} doubled, {len(writers.failures) + len(readers.failures)} failed, "
            f"{mistakes.total()} read wrongly, all of {memories} memories there by listing, id and brute force; "
            f"{moved.ranges} ranges, pause p50 {statistics.median(pauses):.0f} ms, p99 {p99:.0f} ms, "
            f"{moved.given_up} of {len(pauses)} fences given up, "
            f"slowest write {writers.slowest_s * 1000:.0f} ms"
        )
        record("2 to 4 shards and back under load", "0 lost, doubled, failed; pause p99 < 500 ms", measured)
        print(measured, [str(error) for error in (*writers.failures, *readers.failures)][:5])
        assert (lost, doubled, writers.wrong, mistakes, readers.incomplete) == (0, 0, [], {}, 0)
        assert (writers.failures, readers.failures) == ([], [])
        assert await slots.left_over() == []
        # The 99th of a hundred of so few is the slowest, which is the machine's own when it stands still for a moment.
        assert (p99 if scale is FULL else statistics.median(pauses)) < 500
