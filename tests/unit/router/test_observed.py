"""What is noted of requests: users in a bounded list and in no metric, and answers by their size and worth."""

from google.protobuf.message import Message

from common.telemetry.registry import REGISTRY
from memshard.v1 import memory_pb2 as pb
from router.guard import Guards
from router.levels import Levels
from router.observed import Observed
from tests.support.clock import Clock


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


def test_an_erased_user_is_on_the_list_no_more() -> None:
    seen = observed()
    pass_all(seen, "erased")
    pass_all(seen, "stays")
    request = pb.EraseUserRequest(user_id="erased")
    seen.asked("EraseUser", request)
    seen.answered("EraseUser", request, pb.EraseUserResponse(), 10)
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
