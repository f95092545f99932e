"""What is noted of requests: users in a bounded list and in no metric, and answers by their size and worth."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from google.protobuf.message import Message

from common import tracing
from common.errors import InvalidArgument, MemshardError, Unavailable
from common.telemetry.calls import Call, Operation
from common.telemetry.registry import REGISTRY
from memshard.v1 import memory_pb2 as pb
from router.guard import Guards
from router.levels import Levels
from router.observed import Observed
from tests.support.clock import Clock

SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]


def observed(key: bytes = b"k" * 32) -> Observed:
    return Observed(key, Levels(Guards()), Clock())


def series() -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items())) for family in REGISTRY.collect() for sample in family.samples
    }


def requests(user: str) -> list[tuple[str, Message, Message]]:
    memory = pb.Memory(user_id=user, content="tea", agent_id=f"agent of {user}")
    found = pb.SearchMemoriesResponse(results=[pb.ScoredMemory(score=0.7)], score_kind=pb.SCORE_KIND_COSINE)
    return [
        ("StoreMemory", pb.StoreMemoryRequest(memory=memory), pb.StoreMemoryResponse()),
        ("BatchStoreMemories", pb.BatchStoreMemoriesRequest(memories=[memory]), pb.BatchStoreMemoriesResponse()),
        ("UpdateMemory", pb.UpdateMemoryRequest(memory=memory), pb.UpdateMemoryResponse()),
        ("GetMemory", pb.GetMemoryRequest(user_id=user), pb.GetMemoryResponse()),
        ("ListMemories", pb.ListMemoriesRequest(user_id=user), pb.ListMemoriesResponse()),
        ("ListMemoryVersions", pb.ListMemoryVersionsRequest(user_id=user), pb.ListMemoryVersionsResponse()),
        ("SearchMemories", pb.SearchMemoriesRequest(user_id=user), found),
        ("DeleteMemory", pb.DeleteMemoryRequest(user_id=user), pb.DeleteMemoryResponse()),
    ]


def pass_all(seen: Observed, user: str) -> None:
    for rpc, request, response in requests(user):
        seen.asked(rpc, request)
        seen.answered(rpc, request, response, 100)


def test_ten_thousand_users_add_no_series_and_the_list_stays_as_long() -> None:
    seen = observed()
    pass_all(seen, "first")
    before = series()
    for number in range(10_000):
        pass_all(seen, f"user-{number}")
    assert series() == before
    hitters, total = seen.hot_users(10_000)
    assert len(hitters) == 200
    assert total == 8 * 10_001


def test_ten_thousand_users_who_call_every_operation_add_no_series_whatever_becomes_of_it() -> None:
    seen = observed()
    operations = {rpc.name: Operation(rpc.name, f"{SERVICE.full_name}/{rpc.name}") for rpc in SERVICE.methods}

    def call_all(user: str, error: MemshardError | None) -> None:
        erasure = ("EraseUser", pb.EraseUserRequest(user_id=user, request_id=user), pb.EraseUserResponse())
        called = [*requests(user), erasure]
        assert {rpc for rpc, _, _ in called} == operations.keys()
        for rpc, request, response in called:
            with Call(operations[rpc], tracing.received(rpc, [], begins=True)) as call:
                seen.asked(rpc, request)
                call.error, call.answered = error, error is None
            if error is None:
                seen.answered(rpc, request, response, 100)

    def outcomes(user: str) -> list[MemshardError | None]:
        return [None, InvalidArgument(f"{user} is nobody"), Unavailable(f"nobody serves {user}")]

    for error in outcomes("first"):
        call_all("first", error)
    before = series()
    for number in range(10_000):
        call_all(f"user-{number}", outcomes(f"user-{number}")[number % 3])
    assert series() == before


class Recorder:
    """Keeps all traces, or none."""

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps

    def samples(self, trace_id: int) -> bool:
        return False

    def keep(self, trace: tracing.Trace) -> bool:
        return self._keeps


@pytest.fixture
def recorded() -> Iterator[None]:
    tracing.record(Recorder(keeps=True))
    yield
    tracing.record(None)


def attributes_of(rpc: str, request: Message) -> dict[str, tracing.Value]:
    with tracing.received(rpc, [], begins=True) as span:
        observed().asked(rpc, request)
    return span.attributes


@pytest.mark.usefixtures("recorded")
def test_whose_a_call_was_is_said_of_a_kept_one_as_a_hash_and_forgotten_of_any_other() -> None:
    request = pb.GetMemoryRequest(user_id="alice")
    said = attributes_of("GetMemory", request)["enduser.pseudo.id"]
    assert said == observed().hashed("alice") != "alice"
    tracing.record(Recorder(keeps=False))
    assert not attributes_of("GetMemory", request)


@pytest.mark.usefixtures("recorded")
def test_a_span_has_the_agent_of_what_is_written_if_it_is_one_and_short() -> None:
    def memory(agent: str, user: str = "alice") -> pb.Memory:
        return pb.Memory(user_id=user, content="tea", agent_id=agent)

    def batch(*memories: pb.Memory) -> pb.BatchStoreMemoriesRequest:
        return pb.BatchStoreMemoriesRequest(memories=memories)

    of_one: list[tuple[str, Message]] = [
        ("StoreMemory", pb.StoreMemoryRequest(memory=memory("barista"))),
        ("UpdateMemory", pb.UpdateMemoryRequest(memory=memory("barista"))),
        ("BatchStoreMemories", batch(memory("barista"), memory("barista", "bob"))),
    ]
    for rpc, request in of_one:
        attributes = attributes_of(rpc, request)
        assert attributes["gen_ai.agent.id"] == "barista"
        assert attributes["memshard.operation"] == rpc
        assert "alice" not in str(attributes)
    of_none: list[tuple[str, Message]] = [
        ("StoreMemory", pb.StoreMemoryRequest(memory=memory(""))),
        ("UpdateMemory", pb.UpdateMemoryRequest(memory=memory("b" * 257))),
        ("BatchStoreMemories", batch()),
        ("BatchStoreMemories", batch(memory("barista"), memory("waiter"))),
        ("BatchStoreMemories", batch(memory("barista"), memory(""))),
        ("BatchStoreMemories", batch(memory("barista"), memory("b" * 257))),
        ("GetMemory", pb.GetMemoryRequest(user_id="alice")),
    ]
    for rpc, request in of_none:
        assert "gen_ai.agent.id" not in attributes_of(rpc, request)


def test_the_sum_of_scores_never_falls_though_a_cosine_may_be_below_zero() -> None:
    def total() -> float:
        name, labels = "agent_memory_relevance_score", {"score_kind": "cosine"}
        assert REGISTRY.get_sample_value(f"{name}_bucket", labels | {"le": "0.1"}) is not None
        return REGISTRY.get_sample_value(f"{name}_sum", labels) or 0.0

    seen = observed()
    sums = [total()]
    for score in (0.7, -0.5, 0.2):
        found = pb.SearchMemoriesResponse(results=[pb.ScoredMemory(score=score)], score_kind=pb.SCORE_KIND_COSINE)
        seen.answered("SearchMemories", pb.SearchMemoriesRequest(), found, 100)
        sums.append(total())
    assert [round(later - earlier, 6) for earlier, later in pairwise(sums)] == [0.7, 0.0, 0.2]


def test_an_erased_user_is_on_the_list_no_more() -> None:
    seen = observed()
    pass_all(seen, "erased")
    pass_all(seen, "stays")
    seen.asked("EraseUser", pb.EraseUserRequest(user_id="erased"))
    seen.forget(lambda user: user == "erased")
    hitters, _ = seen.hot_users(100)
    assert {hitter.item[1] for hitter in hitters} == {"stays"}


def test_names_that_are_none_or_too_long_are_not_kept() -> None:
    seen = observed()
    pass_all(seen, "")
    pass_all(seen, "x" * 100_000)
    assert seen.hot_users(100) == ([], 0.0)


def test_hashes_are_the_clusters_own() -> None:
    assert observed().hashed("alice") == observed().hashed("alice")
    assert len({observed().hashed("alice"), observed().hashed("bob"), observed(b"o" * 32).hashed("alice")}) == 3


def test_rates_are_of_the_last_seconds() -> None:
    seen = observed()
    pass_all(seen, "somebody")
    assert seen.requests_per_s == 0.8
    assert seen.queries_per_s == 4 / 60
