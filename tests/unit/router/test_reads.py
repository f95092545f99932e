"""Reads over real gRPC to servers that behave as told: who is asked, for how long, and who stands in for whom."""

import asyncio
import math
import time
from collections import Counter
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.breaker import State
from common.deadline import Deadline
from common.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    MemshardError,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WrongShard,
)
from common.limiter import OVERLOADED
from common.retry import RetryBudget
from common.topology import Topology
from memshard.internal.v1 import shard_pb2
from router.consistency import EVENTUAL, STRONG, Consistency, Position
from router.guard import Kind
from router.shards import GET
from tests.support.eventually import eventually
from tests.unit.router.scripted import Server, router, servers, shard

# Generous beside what is configured: tests share their machine, which stands still now and then.
_SOON_S = 2.0


def session(timeline: int, lsn: int) -> Consistency:
    return Consistency(strong=False, positions={"shard-0": Position(timeline, lsn), "gone": Position(9, 9)})


async def test_reads_spread_evenly_over_the_replicas_and_spare_the_primary() -> None:
    # Time enough for a read on a busy machine: one that is late is asked of the next.
    async with servers(3) as (primary, replicas), router(primary, *replicas, replica_timeout_s=10) as reader:

        async def is_spread() -> bool:
            counts = Counter([await reader.get(EVENTUAL) for _ in range(30)])
            return counts == {"replica-0": 10, "replica-1": 10, "replica-2": 10}

        # A replica that is looked at while the machine stands still is left out for a moment.
        await eventually(is_spread)
        assert not primary.asked


async def test_the_primary_takes_its_share_when_told_to() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, reads="all") as reader:
        replicas[0].freeze()
        waiting = asyncio.create_task(reader.get(EVENTUAL))
        await eventually(lambda: replicas[0].in_flight)
        assert await reader.get(EVENTUAL) == "primary"
        replicas[0].thaw()
        assert await waiting in {"replica-0", "primary"}


async def test_a_busy_replica_gets_less() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas, replica_timeout_s=10) as reader:
        replicas[0].freeze()
        # One of two in a row is sent to it, and stays there.
        stuck = [asyncio.create_task(reader.get(EVENTUAL)) for _ in range(2)]
        await eventually(lambda: replicas[0].in_flight)
        assert Counter([await reader.get(EVENTUAL) for _ in range(10)]) == {"replica-1": 10}
        replicas[0].thaw()
        await asyncio.gather(*stuck)


async def test_strong_reads_are_the_primarys_and_carry_no_freshness() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas) as reader:
        assert await reader.get(STRONG) == "primary"
        assert not primary.asked[-1].HasField("fresh")
        assert not replicas[0].asked


async def test_what_is_asked_for_travels_with_the_read() -> None:
    wanted = Consistency(strong=False, positions={"shard-0": Position(1, 7)}, max_staleness_ms=1500)
    async with servers(1) as (primary, replicas), router(primary, *replicas, freshness_wait_s=0.05) as reader:
        await reader.get(wanted)
        fresh = replicas[0].asked[-1].fresh
        assert (fresh.position.shard_id, fresh.position.timeline, fresh.position.lsn) == ("shard-0", 1, 7)
        assert (fresh.max_staleness_ms, fresh.wait_ms) == (1500, 50)
        replicas[0].error = Unavailable("not now")
        await reader.get(wanted)
        # The primary hears it too: one that was replaced without knowing is behind as well.
        assert primary.asked[-1].fresh.position == fresh.position
        await reader.get(EVENTUAL)
        assert primary.asked[-1].HasField("fresh")
        assert not primary.asked[-1].fresh.HasField("position")


async def test_a_replica_that_catches_up_in_time_answers() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, freshness_wait_s=5) as reader:
        # The longest wait is half of what the replica gets at all.
        reading = asyncio.create_task(reader.get(session(1, 200), timeout_s=20))
        await eventually(lambda: replicas[0].in_flight)
        await replicas[0].move(Position(1, 200))
        assert await reading == "replica-0"


async def test_when_all_replicas_lag_the_primary_answers_and_they_are_left_in_peace() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas, freshness_wait_s=0.05) as reader:
        await primary.move(Position(1, 300))
        began = time.monotonic()
        assert await reader.get(session(1, 200)) == "primary"
        assert time.monotonic() - began < 0.05 + _SOON_S
        # One has waited, and the other only been asked; then both are known to be behind.
        assert sum(server.asked[-1].fresh.wait_ms >= 40 for server in replicas) == 1
        before = [len(replica.asked) for replica in replicas]
        assert [await reader.get(session(1, 250)) for _ in range(10)] == ["primary"] * 10
        assert [len(replica.asked) for replica in replicas] == before
        # What they do have, they go on answering.
        assert (await reader.get(session(1, 100))).startswith("replica")
        # And once one has caught up it is asked again.
        await replicas[1].move(Position(1, 300))
        looks = replicas[1].looks
        await eventually(lambda: replicas[1].looks > looks + 1)
        assert await reader.get(session(1, 250)) == "replica-1"


async def test_a_position_on_a_later_timeline_is_ahead_of_any_on_an_earlier_one() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        await primary.move(Position(2, 150))
        await replicas[0].move(Position(1, 1000))
        await replicas[1].move(Position(2, 150))
        assert {await reader.get(session(2, 120)) for _ in range(6)} == {"replica-1"}
        assert {await reader.get(session(1, 5000)) for _ in range(4)} == {"replica-1"}


async def test_bounded_staleness_passes_over_who_is_too_old() -> None:
    async with servers(2) as (primary, replicas):
        replicas[0].lag_ms = 3000
        async with router(primary, *replicas) as reader:
            wanted = Consistency(strong=False, max_staleness_ms=1000)
            assert {await reader.get(wanted) for _ in range(6)} == {"replica-1"}
            assert {await reader.get(EVENTUAL) for _ in range(6)} == {"replica-0", "replica-1"}


async def test_none_fresh_and_the_primary_down_is_unavailable_with_a_time_to_try_again() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        await primary.stop()
        with pytest.raises(Unavailable) as caught:
            await reader.get(session(1, 101))
        assert caught.value.reason == "NO_FRESH_SERVER"
        assert caught.value.retryable
        assert not any(replica.answered for replica in replicas)
        with pytest.raises(Unavailable):
            await reader.get(STRONG)
        # Whoever asks for less is served.
        assert (await reader.get(session(1, 100))).startswith("replica")
        assert (await reader.get(EVENTUAL)).startswith("replica")


async def test_with_the_primary_down_a_replica_that_catches_up_is_waited_for() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        await primary.stop()
        reading = asyncio.create_task(reader.get(session(1, 200)))
        await eventually(lambda: any(r.asked and r.asked[-1].fresh.wait_ms > 100 for r in replicas))
        for replica in replicas:
            await replica.move(Position(1, 200))
        assert (await reading).startswith("replica")


async def test_a_primary_that_hangs_is_stood_in_for_like_one_that_is_down() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=1) as reader:
        primary.freeze()
        with pytest.raises(Unavailable) as caught:
            await reader.get(session(1, 200), timeout_s=4)
        assert caught.value.reason == "NO_FRESH_SERVER"
        reading = asyncio.create_task(reader.get(session(1, 200), timeout_s=4))
        await eventually(lambda: len(primary.asked) == 2)
        await replicas[0].move(Position(1, 200))
        assert await reading == "replica-0"


async def test_a_primary_that_is_behind_its_successor_never_answers() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        with pytest.raises(Unavailable) as caught:
            await reader.get(session(2, 1))
        assert caught.value.reason == "NO_FRESH_SERVER"
        assert not primary.answered


async def test_a_frozen_replica_costs_at_most_its_time_is_out_within_a_second_and_comes_back() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        replicas[0].freeze()
        began = time.monotonic()
        longest_s = 0.0
        while reader.known() != {"replica-1"}:
            at = time.monotonic()
            assert await reader.get(EVENTUAL) in {"replica-1", "primary"}
            longest_s = max(longest_s, time.monotonic() - at)
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 1 + _SOON_S
        assert longest_s < 0.25 + _SOON_S
        # Nobody else waits for it after the first has.
        assert len(replicas[0].asked) <= 1
        replicas[0].thaw()
        await reader.knows("replica-0", "replica-1", within_s=1 + _SOON_S)
        assert {await reader.get(EVENTUAL) for _ in range(4)} == {"replica-0", "replica-1"}


async def test_a_replica_that_answers_reads_is_not_given_up_for_being_too_busy_to_be_looked_at() -> None:
    # Time enough for a read on a busy machine: one that is late goes to the primary.
    quick_looks: dict[str, Any] = {"replica_poll_s": 0.1, "replica_timeout_s": 10}
    async with servers(1) as (primary, replicas), router(primary, *replicas, **quick_looks) as reader:
        replicas[0].leave_looks_unanswered()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert await reader.get(EVENTUAL) in {"replica-0", "primary"}
            assert reader.known() == {"replica-0"}
        # The primary has seen nothing but the hedges of reads that took long.
        assert len(primary.asked) <= reader.reads.hedges.sent
        # Once nobody asks it anything, nothing is heard of it either.
        await reader.knows()


async def test_calls_in_flight_at_a_replica_that_is_lost_go_elsewhere_at_once() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=60) as reader:
        replicas[0].freeze()
        began = time.monotonic()
        assert await reader.get(EVENTUAL, timeout_s=60) == "primary"
        assert time.monotonic() - began < 1 + _SOON_S


@pytest.mark.parametrize("how", ["killed", "drained", "promoted"])
async def test_a_replica_that_leaves_or_returns_is_noticed_within_a_second(how: str) -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        leaving = replicas[0]
        match how:
            case "killed":
                await leaving.stop()
            case "drained":
                leaving.serving = False
            case "promoted":
                leaving.writable = True
        await reader.knows("replica-1", within_s=1 + _SOON_S)
        assert {await reader.get(EVENTUAL) for _ in range(4)} == {"replica-1"}
        # Long enough for gRPC's own pauses between attempts to grow.
        gone_until = time.monotonic() + 3
        await eventually(lambda: time.monotonic() > gone_until)
        leaving.serving, leaving.writable = True, False
        if how == "killed":
            await leaving.start()
        await reader.knows("replica-0", "replica-1", within_s=1 + _SOON_S)


async def test_nothing_fails_while_replicas_come_and_go_under_load() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        stop = asyncio.Event()
        reads = 0

        async def read() -> None:
            nonlocal reads
            while not stop.is_set():
                await reader.get(session(1, 100))
                reads += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(read())
            for replica in (*replicas, *replicas):
                await replica.stop()
                await reader.knows(*(r.name for r in replicas if r is not replica))
                await replica.start()
                await reader.knows("replica-0", "replica-1")
            stop.set()
        assert reads > 100


@pytest.mark.parametrize(
    "error", [Unavailable("no"), DeadlineExceeded("late"), WrongShard("not mine", epoch=99), Internal("a bug")]
)
async def test_what_a_replica_cannot_answer_the_next_server_does(error: Exception) -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas) as reader:
        replicas[0].error = error  # type: ignore[assignment]
        assert await reader.get(EVENTUAL) == "primary"


def budget(saved_up: float) -> RetryBudget:
    """A fifth of the requests, and so many more."""
    return RetryBudget(time.monotonic, per_s=saved_up / 10)


async def test_what_a_replica_refuses_for_load_comes_over_the_primary_within_the_retry_budget_only() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, budget=budget(1)) as reader:
        replicas[0].error = ResourceExhausted("too much", reason=OVERLOADED)
        came = [(await asyncio.gather(reader.get(EVENTUAL), return_exceptions=True))[0] for _ in range(20)]
        told = Counter(getattr(one, "reason", one) for one in came)
        # One was saved up, and there is one more for every five.
        assert told == {"primary": 5, OVERLOADED: 15}
        assert len(primary.asked) == 5


async def test_without_leave_to_go_on_from_a_silent_replica_the_caller_s_own_time_is_not_said_to_be_up() -> None:
    limits: dict[str, Any] = {"replica_timeout_s": 0.2}
    async with servers(1) as (primary, replicas), router(primary, *replicas, budget=budget(0), **limits) as reader:
        replicas[0].delay_s = 60
        with pytest.raises(Unavailable) as caught:
            await reader.get(EVENTUAL, timeout_s=20)
        assert caught.value.reason == "SHARD_UNAVAILABLE"
        assert "replica-0 did not answer in time" in caught.value.message
        assert not primary.asked


@pytest.mark.parametrize("error", [Unavailable("no"), DeadlineExceeded("late"), Internal("a bug")])
async def test_reads_that_fail_everywhere_reach_servers_within_the_retry_budget_only(error: MemshardError) -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas, budget=budget(1)) as reader:
        for server in (primary, *replicas):
            server.error = error
        for _ in range(20):
            with pytest.raises(MemshardError):
                await reader.get(EVENTUAL)
        assert sum(len(server.asked) for server in (primary, *replicas)) <= 1.2 * 20 + 1


@pytest.mark.parametrize(
    "error", [Unavailable("behind", reason="REPLICA_BEHIND"), WrongShard("not mine", epoch=99), Unimplemented("new")]
)
async def test_going_on_from_a_server_that_is_well_takes_no_leave(error: MemshardError) -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas, budget=budget(0)) as reader:
        for replica in replicas:
            replica.error = error
        assert [await reader.get(EVENTUAL) for _ in range(4)] == ["primary"] * 4


async def test_going_on_from_a_server_that_nobody_was_let_ask_takes_no_leave() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, budget=budget(0)) as reader:
        guard = reader.shards.guards.of("shard-0", "replica-0")
        guard._heard_at = math.inf  # Looks at its health half-open nothing.
        while (breaker := guard.breakers[Kind.RETRIEVE]).state is not State.OPEN:
            breaker.admit().failure()
        assert [await reader.get(EVENTUAL) for _ in range(4)] == ["primary"] * 4
        assert not replicas[0].asked


async def test_refusals_do_not_make_answers_look_late_nor_one_read_look_like_two() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        for replica in replicas:
            replica.error = ResourceExhausted("too much", reason=OVERLOADED)
        for _ in range(10):
            assert await reader.get(EVENTUAL) == "primary"
        assert reader.reads.hedges.timer("shard-0", "Get")._window.count == 0
        assert reader.reads.hedges._budget._credit == 10
        replicas[0].error = replicas[1].error = None
        for _ in range(10):
            assert (await reader.get(EVENTUAL)).startswith("replica")
        assert reader.reads.hedges.timer("shard-0", "Get")._window.count == 10


async def test_a_bug_in_a_replica_is_gone_over_and_logged() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas) as reader:
        replicas[0].error = Internal("a bug")
        with capture_logs() as logged:
            assert await reader.get(EVENTUAL) == "primary"
        assert [(line["log_level"], line["shard"], line["replica"]) for line in logged] == [
            ("error", "shard-0", "replica-0")
        ]


async def test_what_is_wrong_with_the_request_is_said_by_whoever_is_asked() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas) as reader:
        replicas[0].error = InvalidArgument("no such thing")
        with pytest.raises(InvalidArgument):
            await reader.get(EVENTUAL)
        assert not primary.asked


async def test_the_deadline_holds_whoever_hangs() -> None:
    async with servers(2) as (primary, replicas), router(primary, *replicas) as reader:
        for server in (primary, *replicas):
            server.freeze()
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await reader.get(EVENTUAL, timeout_s=0.4)
        assert time.monotonic() - began < 0.4 + _SOON_S


async def test_a_replica_is_followed_to_its_new_address_and_forgotten_when_it_is_gone() -> None:
    async with servers(2) as (primary, (first, second)), router(primary, first) as reader:
        moved = Server("replica-0")
        async with moved:
            for replicas in ([moved, second], [second]):
                topology = Topology(
                    reader.topology.cluster_id, 2, shards=(shard(primary, replicas),), ranges=reader.topology.ranges
                )
                reader.replicas.follow(topology)
                reader.shards.follow(topology)
                reader.topology = topology
                await reader.knows(*(replica.name for replica in replicas))
            looks = moved.looks
            later = second.looks
            await eventually(lambda: second.looks > later + 2)
            assert moved.looks == looks


async def test_a_fan_out_says_which_kinds_of_servers_answered() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas) as reader:
        request = shard_pb2.GetRequest(id="00000000-0000-0000-0000-000000000000")
        gathered = await reader.fanout.ask_all(GET, request, Deadline.after(5), EVENTUAL)
        assert gathered.served_by == {"replica"}
        gathered = await reader.fanout.ask_all(GET, request, Deadline.after(5))
        assert gathered.served_by == {"primary"}
