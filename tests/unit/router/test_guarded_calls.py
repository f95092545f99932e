"""Calls over real gRPC to servers that fail as told: what is tried again, what is refused, what is asked twice."""

import asyncio
import time
from collections import Counter

import pytest
from grpc_health.v1 import health_pb2

from common.breaker import BREAKER_OPEN, State
from common.breaker_settings import SHARD
from common.deadline import Deadline
from common.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    OutcomeUnknown,
    ReadOnly,
    ResourceExhausted,
    Unavailable,
)
from common.limiter import OVERLOADED, Admission, Priority
from common.retry import RetryBudget, RetrySettings
from common.telemetry.registry import RPC_CLIENT_DURATION
from memshard.internal.v1 import shard_pb2
from router.consistency import EVENTUAL, STRONG
from router.guard import Kind
from router.retries import Retries
from router.shards import GET
from tests.support.eventually import eventually
from tests.support.proxy import Proxy
from tests.unit.router.scripted import Router, Server, router, servers


class Behind(Server):
    """A server that is reached through a proxy."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        super().__init__(server.name, server.shard_id, writable=server.writable)
        self._proxy = proxy

    @property
    def address(self) -> str:
        return self._proxy.address


class SilentNowAndThen(Server):
    """A server that leaves every other look unanswered, and has nothing good to say to those between."""

    checks = 0

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, deadline: Deadline
    ) -> health_pb2.HealthCheckResponse:
        self.checks += 1
        if self.checks % 2:
            await asyncio.Event().wait()
        return await super().Check(request, deadline)

    async def Describe(  # noqa: N802
        self, request: shard_pb2.DescribeRequest, deadline: Deadline
    ) -> shard_pb2.DescribeResponse:
        raise Unavailable("no database")


# What opens a shard's breaker (common/breaker_settings.py).
_IN_A_ROW = 5


def states(reader: Router, replica: str | None = None) -> dict[Kind, State]:
    """The states of a server's breakers."""
    guard = reader.shards.guards.of("shard-0", replica)
    return {kind: breaker.state for kind, breaker in guard.breakers.items()}


async def open_for_reads(reader: Router, primary: Server) -> None:
    """Fails calls until the breaker opens."""
    primary.error = InvalidArgument("once it is asked again")
    primary.fails_next = 1000
    for _ in range(_IN_A_ROW):
        if states(reader)[Kind.RETRIEVE] is not State.OPEN:
            with pytest.raises(Unavailable):
                await reader.get(STRONG)
    assert states(reader)[Kind.RETRIEVE] is State.OPEN


def expect_ten_milliseconds(reader: Router) -> None:
    """As if it had read often: what takes more than 10 ms is asked of a second server, and two hedges are paid for."""
    hedges = reader.reads.hedges
    for _ in range(150):
        hedges.read()
        hedges.timer("shard-0", "Get").observe(0.01)


async def test_a_failure_that_passes_is_not_seen() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.fails_next = 2
        assert await reader.get(STRONG) == "primary"
        assert len(primary.asked) == 3
        primary.fails_next = 2
        await reader.store(b"a")
        assert primary.stored == [b"a"]


async def test_there_are_three_attempts_and_no_more() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.fails_next = 3
        with pytest.raises(Unavailable, match="not now"):
            await reader.get(STRONG)
        assert len(primary.asked) == 3


@pytest.mark.parametrize("error", [InvalidArgument("no"), NotFound("no"), AlreadyExists("no"), ReadOnly("no")])
async def test_what_will_not_change_is_not_tried_again(error: Exception) -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.error = error  # type: ignore[assignment]
        with pytest.raises(type(error)):
            await reader.store()
        assert len(primary.asked) == 1
        assert set(states(reader).values()) == {State.CLOSED}


async def test_no_attempt_begins_that_the_deadline_would_end() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.error = Unavailable("later", retry_after_s=1.0)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="later"):
            await reader.get(STRONG, timeout_s=0.5)
        assert len(primary.asked) == 1
        assert time.monotonic() - began < 0.5


async def test_retries_end_with_their_budget() -> None:
    budget = RetryBudget(asyncio.get_running_loop().time, share=0.2, per_s=0.1, window_s=10)
    retries = Retries(RetrySettings(base_s=0.001), budget)
    attempts = 0

    async def fails() -> None:
        nonlocal attempts
        attempts += 1
        raise Unavailable("not now")

    for _ in range(20):
        with pytest.raises(Unavailable):
            await retries.run(fails, Deadline.after(5))
    # One was saved up, and there is one more for every five.
    assert attempts == 20 + 1 + 4


async def test_a_write_whose_answer_was_lost_is_tried_again_and_settled() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.loses_next = 1
        await reader.store(b"the same")
        assert primary.stored == [b"the same", b"the same"]


@pytest.mark.parametrize("later", [Unavailable("x"), ReadOnly("x"), ResourceExhausted("x")])
async def test_a_write_in_doubt_stays_in_doubt_when_its_retry_is_refused(later: Exception) -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.loses_next = 1
        storing = asyncio.create_task(reader.store(b"a"))
        await eventually(lambda: primary.stored)
        primary.error = later  # type: ignore[assignment]
        with pytest.raises(OutcomeUnknown):
            await storing


async def test_a_write_in_doubt_is_settled_by_an_answer_of_the_retry() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.loses_next = 1
        storing = asyncio.create_task(reader.store(b"a"))
        await eventually(lambda: primary.stored)
        primary.error = AlreadyExists("by another")
        with pytest.raises(AlreadyExists):
            await storing


async def test_after_five_failures_nobody_is_asked_and_callers_hear_it_at_once() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        # No look at its health has calls try it meanwhile.
        primary.serving = False
        await open_for_reads(reader, primary)
        asked = len(primary.asked)
        with pytest.raises(Unavailable) as caught:
            await reader.get(STRONG)
        assert caught.value.reason == BREAKER_OPEN
        assert 0 < (caught.value.retry_after_s or 0) <= 1
        assert len(primary.asked) == asked


async def test_a_breaker_for_reads_lets_writes_through() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        await open_for_reads(reader, primary)
        primary.fails_next, primary.error = 0, None
        await reader.store(b"a")
        assert primary.stored == [b"a"]


async def test_a_primary_that_is_back_is_asked_again_within_two_seconds() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        await primary.stop()
        for _ in range(_IN_A_ROW):
            with pytest.raises(Unavailable):
                await reader.get(STRONG, timeout_s=1)
        assert states(reader)[Kind.RETRIEVE] is State.OPEN
        await primary.start()

        async def answers() -> bool:
            try:
                return await reader.get(STRONG) == "primary"
            except Unavailable:
                return False

        await eventually(answers, within_s=5)


async def test_a_health_check_half_opens_long_before_the_breaker_would_by_itself() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.serving = False
        for _ in range(3):
            # Each round that fails doubles the wait.
            await open_for_reads(reader, primary)
            reader.shards.guards.of("shard-0").breakers[Kind.RETRIEVE].probe_succeeded()
        await open_for_reads(reader, primary)
        assert reader.shards.guards.of("shard-0").breakers[Kind.RETRIEVE].refused_for_s() > 6
        primary.fails_next, primary.error, primary.serving = 0, None, True
        await eventually(lambda: states(reader)[Kind.RETRIEVE] is State.HALF_OPEN, within_s=5)
        assert await reader.get(STRONG) == "primary"


async def test_all_who_come_back_at_once_find_the_server_well_though_few_may_try_it() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.serving = False  # No look at its health lets anybody in.
        await open_for_reads(reader, primary)
        primary.fails_next, primary.error, primary.delay_s = 0, None, 0.03
        await eventually(lambda: not reader.shards.guards.of("shard-0").refuses(Kind.RETRIEVE))
        before = len(primary.asked)
        assert await asyncio.gather(*(reader.get(STRONG) for _ in range(20))) == ["primary"] * 20
        assert len(primary.asked) == before + 20


async def test_nobody_waits_for_probes_that_hang() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.serving = False
        await open_for_reads(reader, primary)
        primary.fails_next, primary.error = 0, None
        primary.freeze()
        await eventually(lambda: not reader.shards.guards.of("shard-0").refuses(Kind.RETRIEVE))
        probing = [asyncio.create_task(reader.get(STRONG, timeout_s=30)) for _ in range(SHARD.probes)]
        await eventually(lambda: primary.in_flight == SHARD.probes)
        breaker = reader.shards.guards.of("shard-0").breakers[Kind.RETRIEVE]
        await eventually(lambda: not breaker.undecided_for_s())
        asked = len(primary.asked)
        for _ in range(5):
            with pytest.raises(Unavailable) as caught:
                await reader.get(STRONG, timeout_s=30)
            assert caught.value.reason == BREAKER_OPEN
        assert len(primary.asked) == asked
        primary.thaw()
        assert await asyncio.gather(*probing) == ["primary"] * SHARD.probes


async def test_hurried_callers_do_not_cut_off_the_others() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.freeze()
        for _ in range(2 * _IN_A_ROW):
            with pytest.raises(DeadlineExceeded):
                await reader.get(STRONG, timeout_s=0.06)
        assert set(states(reader).values()) == {State.CLOSED}
        for _ in range(_IN_A_ROW):
            with pytest.raises(DeadlineExceeded):
                await reader.get(STRONG, timeout_s=0.3)
        assert states(reader)[Kind.RETRIEVE] is State.OPEN


async def test_callers_who_leave_say_nothing_of_the_server_and_hold_no_place() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        primary.freeze()
        leaving = [asyncio.create_task(reader.get(STRONG)) for _ in range(20)]
        await eventually(lambda: primary.in_flight == len(leaving))
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        guard = reader.shards.guards.of("shard-0")
        assert guard.limiter.in_flight == 0
        assert set(states(reader).values()) == {State.CLOSED}
        await eventually(lambda: primary.in_flight == 0)


async def test_calls_are_counted_by_what_became_of_them_also_those_that_nobody_waited_for() -> None:
    def counted() -> Counter[str]:
        (metric,) = RPC_CLIENT_DURATION.collect()
        of_get = [sample for sample in metric.samples if sample.labels["rpc_method"].endswith("ShardService/Get")]
        counts = [sample for sample in of_get if sample.name.endswith("_count")]
        return Counter({sample.labels["rpc_response_status_code"]: int(sample.value) for sample in counts})

    async with servers(0) as (primary, _), router(primary) as reader:
        before = counted()
        assert await reader.get(STRONG) == "primary"
        primary.error = NotFound("no")
        with pytest.raises(NotFound):
            await reader.get(STRONG)
        primary.freeze()
        leaving = asyncio.create_task(reader.get(STRONG))
        await eventually(lambda: primary.in_flight)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert counted() - before == {"OK": 1, "NOT_FOUND": 1, "CANCELLED": 1}


async def test_more_than_the_limit_is_refused_at_once_and_elsewhere_nothing_is_felt() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=5) as reader:
        primary.freeze()
        limit = reader.shards.guards.of("shard-0").limiter.limit
        stuck = [asyncio.create_task(reader.get(STRONG)) for _ in range(limit)]
        await eventually(lambda: primary.in_flight == limit)
        with pytest.raises(ResourceExhausted) as caught:
            await reader.get(STRONG)
        assert (caught.value.reason, caught.value.retry_after_s) == (OVERLOADED, 1.0)
        assert await reader.get(EVENTUAL) == "replica-0"
        primary.thaw()
        assert await asyncio.gather(*stuck) == ["primary"] * limit


async def test_what_is_about_all_users_is_no_measure_of_how_long_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        guard = reader.shards.guards.of("shard-0")
        admit, kinds = guard.limiter.admit, list[str]()

        def noted(kind: str, priority: Priority) -> Admission:
            kinds.append(kind)
            return admit(kind, priority)

        monkeypatch.setattr(guard.limiter, "admit", noted)
        for user_id, counted in (("", 0), ("somebody", 1)):
            request = shard_pb2.GetRequest(id="00000000-0000-0000-0000-000000000000", user_id=user_id)
            (await reader.fanout.ask_all(GET, request, Deadline.after(5))).require_all()
            assert guard.tally.latency.count == guard.lately.latency.count == counted
        assert kinds == ["GetAll", "Get"]


async def test_a_slow_read_is_asked_of_a_second_server_which_answers() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=5) as reader:
        expect_ten_milliseconds(reader)
        replicas[0].delay_s = 2.0
        began = time.monotonic()
        assert await reader.get(EVENTUAL) == "primary"
        assert time.monotonic() - began < 1.5
        await eventually(lambda: replicas[0].in_flight == 0, within_s=1)


async def test_of_a_hundred_reads_two_are_hedged_at_most() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=5) as reader:
        for _ in range(300):
            await reader.get(EVENTUAL)
        for number in range(200):
            # One of ten is slow, which is less than one of twenty of all: none of them is usual.
            replicas[0].delay_s = 0.1 if number % 10 == 0 else 0.0
            await reader.get(EVENTUAL)
        assert 1 <= len(primary.asked) <= 0.02 * 500


async def test_the_quicker_answer_counts_whichever_it_is() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=5) as reader:
        expect_ten_milliseconds(reader)
        replicas[0].delay_s, primary.delay_s = 0.3, 5.0
        assert await reader.get(EVENTUAL) == "replica-0"
        await eventually(lambda: primary.in_flight == 0, within_s=1)
        # And where one of the two fails, the other's answer does.
        replicas[0].delay_s, primary.delay_s, primary.error = 0.3, 0.0, Unavailable("gone")
        assert await reader.get(EVENTUAL) == "replica-0"


async def test_a_hedge_that_is_refused_does_not_fail_a_read_that_goes_well() -> None:
    async with servers(1) as (primary, replicas), router(primary, *replicas, replica_timeout_s=5) as reader:
        expect_ten_milliseconds(reader)
        replicas[0].delay_s, primary.error = 0.3, ResourceExhausted("too much", reason=OVERLOADED)
        assert await reader.get(EVENTUAL) == "replica-0"


async def test_a_server_whose_connection_was_lost_without_a_word_is_reached_by_a_new_one_within_seconds() -> None:
    async with (
        Server("primary", writable=True) as primary,
        Proxy("127.0.0.1", primary.port) as proxy,
        router(Behind(primary, proxy)) as reader,
    ):
        assert await reader.get(STRONG) == "primary"
        proxy.lose()

        async def answered() -> bool:
            try:
                return await reader.get(STRONG, timeout_s=0.4) == "primary"
            except (DeadlineExceeded, Unavailable):
                return False

        assert not await answered()
        await eventually(answered, within_s=8)


@pytest.mark.parametrize("serving", [False, True])
async def test_a_server_that_is_not_silent_twice_in_a_row_keeps_its_connection(serving: bool) -> None:
    async with SilentNowAndThen("primary", writable=True) as primary, router(primary) as reader:
        primary.serving = serving
        await open_for_reads(reader, primary)
        channel = reader.shards.channel(primary.address)
        await eventually(lambda: primary.checks >= 4)
        assert reader.shards.channel(primary.address) is channel
