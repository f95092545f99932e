"""One process's calls: when they are due, what their latency is counted from, how they end."""

import asyncio
import random
from itertools import pairwise, takewhile

import pytest

from loadtest.calls import Calls, SdkCalls, said
from loadtest.generator import Order, Run, due_times, share_of
from loadtest.profile import Operation, Profile, parse
from loadtest.subjects import Subjects
from loadtest.tally import Said
from memshard import Unavailable, _wire
from memshard.v1 import memory_pb2 as pb
from tests.support.virtual_time import virtual_time


class _Service(SdkCalls):
    """Whatever is asked takes as long as `busy` says; while `stalls` is held, everybody waits. Nothing is sent."""

    def __init__(self, profile: Profile, took_s: float = 0.0) -> None:
        Calls.__init__(self, profile, Subjects(profile, 0))
        self.took_s = took_s
        self.stalled = asyncio.Lock()
        self.made = 0
        self.fails = False
        self.answer: object = None

    async def get(self) -> object:
        self.made += 1
        async with self.stalled:
            pass
        await asyncio.sleep(self.took_s)
        if self.fails:
            raise Unavailable("away", reason="AWAY")
        return self.answer


def _profile(**given: object) -> Profile:
    return parse({"operations": {"get": 1}, "warm_up_s": 0, "processes": 1, **given}, "test")


def _run(calls: Calls) -> Run:
    return Run(calls, Order(calls.profile, "", "sdk", 0))


@pytest.mark.parametrize("arrivals", ["poisson", "even"])
def test_calls_are_due_at_the_rate(arrivals: str) -> None:
    due = list(takewhile(lambda at: at < 100, due_times(50, arrivals, random.Random(1))))
    assert len(due) == pytest.approx(5000, rel=0.05)
    assert all(earlier < later for earlier, later in pairwise(due))


def test_shares_add_up() -> None:
    assert [share_of(10, number, 4) for number in range(4)] == [3, 3, 2, 2]


@pytest.mark.parametrize("concurrency", [None, 1])
@virtual_time
async def test_a_stall_is_felt_by_every_call_that_was_due_meanwhile(concurrency: int | None) -> None:
    """Whoever counts from when a call was sent sees one slow call; all those behind it were not made."""
    service = _Service(_profile(rate=100, arrivals="even", duration_s=1, concurrency=concurrency))
    await service.stalled.acquire()
    loop = asyncio.get_running_loop()
    loop.call_later(0.5, service.stalled.release)
    tally = await _run(service).run(loop.time())
    latency = tally.of("get").latency
    assert tally.of("get").count == pytest.approx(100, abs=1)
    # Due evenly over the half second of the stall, half of the calls waited for a quarter of a second on average.
    assert latency.percentile(0.48) < 0.01
    assert latency.percentile(0.75) == pytest.approx(0.25, abs=0.02)
    assert latency.slowest == pytest.approx(0.5, abs=0.02)


@virtual_time
async def test_callers_without_a_rate_make_one_call_after_the_other() -> None:
    service = _Service(_profile(concurrency=4, duration_s=0.5), took_s=0.05)
    loop = asyncio.get_running_loop()
    tally = await _run(service).run(loop.time())
    assert tally.of("get").count == pytest.approx(40, abs=4)
    assert tally.seconds == pytest.approx(0.5, abs=0.06)


@virtual_time
async def test_what_is_due_in_the_warm_up_does_not_count() -> None:
    service = _Service(_profile(rate=100, arrivals="even", duration_s=0.3, warm_up_s=0.3))
    tally = await _run(service).run(asyncio.get_running_loop().time())
    assert service.made == pytest.approx(60, abs=1)
    assert tally.of("get").count == pytest.approx(30, abs=1)


@virtual_time
async def test_failures_are_counted_by_code_and_not_timed() -> None:
    service = _Service(_profile(rate=50, arrivals="even", duration_s=0.2))
    service.fails = True
    outcomes = (await _run(service).run(asyncio.get_running_loop().time())).of("get")
    assert outcomes.codes == {"UNAVAILABLE": outcomes.count}
    assert outcomes.errors == {"UNAVAILABLE AWAY": outcomes.count}
    assert outcomes.latency.count == 0


@virtual_time
async def test_whoever_stops_it_gets_what_was_measured() -> None:
    service = _Service(_profile(concurrency=2, duration_s=60), took_s=0.01)
    run = _run(service)
    asyncio.get_running_loop().call_later(0.3, run.stop)
    tally = await run.run(asyncio.get_running_loop().time())
    assert tally.of("get").count == pytest.approx(60, abs=2)
    assert tally.seconds == pytest.approx(0.3, abs=0.02)


@virtual_time
async def test_calls_that_never_end_are_cut_off() -> None:
    service = _Service(_profile(rate=20, arrivals="even", duration_s=0.2, timeout_s=0.1))
    await service.stalled.acquire()
    tally = await _run(service).run(asyncio.get_running_loop().time())
    assert tally.cut_off == pytest.approx(4, abs=1)


_REPORT = pb.ReadReport(served_by=["cache"], degradation_level=pb.DEGRADATION_LEVEL_REDUCED)
_MIXED = pb.ReadReport(served_by=["cache", "primary"], degradation_level=pb.DEGRADATION_LEVEL_NORMAL)
_RECEIPT = pb.WriteReceipt(degradation_level=pb.DEGRADATION_LEVEL_ESSENTIAL)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (pb.GetMemoryResponse(report=_REPORT), Said("REDUCED", True)),
        (_wire.get_result(pb.GetMemoryResponse(report=_REPORT)), Said("REDUCED", True)),
        (pb.SearchMemoriesResponse(report=_MIXED), Said("NORMAL", False)),
        (_wire.search_result(pb.SearchMemoriesResponse(report=_MIXED)), Said("NORMAL", False)),
        (pb.DeleteMemoryResponse(receipt=_RECEIPT), Said("ESSENTIAL")),
        (_wire.delete_result(pb.DeleteMemoryResponse(receipt=_RECEIPT)), Said("ESSENTIAL")),
        (pb.ListMemoryVersionsResponse(), Said()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_answer_says_of_itself_is_known_of_both_clients(answer: object, told: Said) -> None:
    assert said(answer) == told


@virtual_time
async def test_levels_and_caches_are_counted_of_what_is_measured() -> None:
    service = _Service(_profile(rate=100, arrivals="even", duration_s=0.2, warm_up_s=0.2))
    service.answer = pb.GetMemoryResponse(report=_REPORT)
    outcomes = (await _run(service).run(asyncio.get_running_loop().time())).of("get")
    assert outcomes.count < service.made
    assert outcomes.levels == {"REDUCED": outcomes.count}
    assert (outcomes.reads, outcomes.cached) == (outcomes.count, outcomes.count)


def test_a_wanted_memory_is_wanted_by_zipfs_law() -> None:
    profile = parse({"operations": {"get": 1}, "concurrency": 2, "data": {"users": 10, "memories": 10, "zipf": 1}}, "")
    subjects = Subjects(profile, 0)
    drawn: dict[object, int] = {}
    for _ in range(20_000):
        key = subjects.key()
        drawn[key] = drawn.get(key, 0) + 1
    counts = sorted(drawn.values(), reverse=True)
    harmonic = sum(1 / rank for rank in range(1, 101))
    assert counts[0] == pytest.approx(20_000 / harmonic, rel=0.1)
    assert counts[1] == pytest.approx(10_000 / harmonic, rel=0.15)
    # All processes want the same ones.
    other = Subjects(profile, 1)
    wanted = max(drawn, key=lambda key: drawn[key])
    assert sum(other.key() == wanted for _ in range(2000)) > 200


def test_every_process_knows_the_same_memories() -> None:
    profile = _profile(concurrency=2, data={"users": 3, "memories": 3, "dimensions": 8})
    one, other = Subjects(profile, 0), Subjects(profile, 1)
    key = one.key()
    assert one.original(key) == other.original(key)
    assert one.fresh() != other.fresh()
    assert len(one.original(key).content.encode()) == profile.data.content_bytes


def test_every_operation_can_be_made() -> None:
    assert _Service(_profile(concurrency=1)).by_operation.keys() == set(Operation)
