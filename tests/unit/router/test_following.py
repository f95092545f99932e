"""A request that met a shard without its slots: where it goes next, and how long it waits."""

import asyncio
import time

from common.deadline import Deadline
from common.departure import Departure
from common.errors import WrongShard
from common.retry import RetryBudget
from common.topology import Shard, SlotRange, Topology
from router.following import Following
from router.topology_watch import TopologyWatch
from tests.support.virtual_time import virtual_time

_TOPOLOGY = Topology(
    "cluster",
    5,
    (Shard("a", "127.0.0.1:1"), Shard("b", "127.0.0.1:2")),
    (SlotRange(0, 8191, "a"), SlotRange(8192, 16383, "b")),
)
_GONE = Departure(10, 20, "a", "new", "127.0.0.1:3", 6, 1, 700)


def _watch(seen: list[Topology] | None = None) -> TopologyWatch:
    """One that nobody runs: its catalog is out of reach."""
    changed = [] if seen is None else seen
    return TopologyWatch("postgresql://nobody@127.0.0.1:1/none", _TOPOLOGY, poll_s=60, changed=changed.append)


def _budget(saved_up: float = 100.0) -> RetryBudget:
    """One with room for so many retries."""
    return RetryBudget(time.monotonic, per_s=saved_up / 10)


@virtual_time
async def test_what_a_shard_tells_is_routed_by_at_once() -> None:
    seen: list[Topology] = []
    watch = _watch(seen)
    following = Following(watch, Deadline.after(5), _budget())
    assert await following.again([WrongShard("moved", epoch=6, departures=(_GONE,))])
    assert watch.topology.owner(15).address == "127.0.0.1:3"
    assert (watch.topology.epoch, seen) == (6, [watch.topology])


@virtual_time
async def test_what_the_catalog_knows_already_is_no_news() -> None:
    watch = _watch()
    old = Departure(10, 20, "a", "b", "127.0.0.1:2", 5, 1, 700)
    assert not watch.told([old])
    assert watch.topology.owner(15).shard_id == "a"


@virtual_time
async def test_of_what_two_shards_tell_the_later_holds_whoever_is_heard_first() -> None:
    back = Departure(10, 20, "new", "a", "127.0.0.1:1", 8, 1, 900)
    for order in ([_GONE, back], [back, _GONE]):
        watch = _watch()
        for gone in order:
            assert watch.told([gone])
        assert watch.topology.owner(15).shard_id == "a"
        assert not watch.told([_GONE])


@virtual_time
async def test_a_fence_is_waited_for_and_not_for_ever() -> None:
    watch = _watch()
    following = Following(watch, Deadline.after(0.6), _budget())
    loop = asyncio.get_running_loop()
    began, turns = loop.time(), 0
    while await following.again([WrongShard("fenced", epoch=5, fenced=True)]):
        turns += 1
    # With a quarter of a second left in which to say so, and without hammering the shard.
    assert 0.2 < loop.time() - began < 0.6
    assert 4 <= turns < 30


@virtual_time
async def test_a_new_owner_ends_the_wait_for_a_fence() -> None:
    watch = _watch()
    following = Following(watch, Deadline.after(5), _budget())
    fenced = WrongShard("fenced", epoch=5, fenced=True)
    assert await following.again([fenced])
    watch.told([_GONE])
    assert watch.topology.owner(15).shard_id == "new"


@virtual_time
async def test_whoever_waits_for_a_fence_asks_no_more_than_the_budget_lets_him() -> None:
    watch, budget = _watch(), _budget(saved_up=3)
    fenced = WrongShard("fenced", epoch=5, fenced=True)
    turns = 0

    async def wait() -> None:
        nonlocal turns
        following = Following(watch, Deadline.after(0.6), budget)
        while await following.again([fenced]):
            turns += 1

    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(wait())
    assert turns == 3
    # Nobody gives up for that before his time.
    assert loop.time() - began > 0.3


@virtual_time
async def test_a_new_owner_ends_the_wait_of_those_who_have_no_leave_to_ask() -> None:
    watch = _watch()
    following = Following(watch, Deadline.after(5), _budget(saved_up=0))
    waiting = asyncio.create_task(following.again([WrongShard("fenced", epoch=5, fenced=True)]))
    await asyncio.sleep(0)
    watch.told([_GONE])
    async with asyncio.timeout(1):
        assert await waiting
