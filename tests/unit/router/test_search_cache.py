"""Search results that a router remembers: which search they are of, and what makes them count for nothing."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from common.config import RouterSettings
from common.slots import SLOT_COUNT
from common.topology import Cutover, Shard, SlotRange, Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import EVENTUAL, STRONG, Consistency, Position
from router.search_cache import KeptResults, SearchCache, SearchKey
from router.stamps import Stamp
from tests.support.clock import Clock
from tests.support.spans import Spans
from tests.unit.router.memories import memory

SLOT = 7
ONE = Topology("c", 1, (Shard("a", "a:1"), Shard("b", "b:1")), (SlotRange(0, SLOT_COUNT - 1, "a"),))
MOVED = replace(
    ONE,
    epoch=2,
    ranges=(SlotRange(0, SLOT, "b"), SlotRange(SLOT + 1, SLOT_COUNT - 1, "a")),
    cutovers=(Cutover("a", "b", 1, 700),),
)
RETURNED = replace(ONE, epoch=3, cutovers=(Cutover("a", "b", 1, 700), Cutover("b", "a", 1, 900)))
KEY = SearchKey("user", b"digest")


class Cache:
    """One in the test's own time."""

    def __init__(self, **settings: float) -> None:
        self.clock = Clock()
        self.believes = True
        self.searches = SearchCache(
            RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"), **settings),  # type: ignore[arg-type]
            lambda: self.believes,
            self.clock,
        )

    def stamp(self, lsn: int = 100, *, timeline: int = 1, age_ms: int = 0, shard_id: str = "a") -> Stamp:
        said = shard_pb2.ReadStamp(timeline=timeline, lsn=lsn, age_ms=age_ms)
        return Stamp.of_answer(shard_id, said, self.searches.now())

    def remember(self, stamp: Stamp | None = None, key: SearchKey = KEY, **fields: object) -> None:
        fields = {"expire_time": None, "embedding_state": pb.EMBEDDING_STATE_READY, **fields}
        self.clock.pass_(0.001)
        response = pb.SearchMemoriesResponse(results=[pb.ScoredMemory(memory=memory(**fields), score=0.5)])
        kept = KeptResults(SLOT, response.SerializeToString(), stamp or self.stamp())
        self.searches.remember(key, kept, response)
        self.clock.pass_(0.001)

    def find(self, consistency: Consistency = EVENTUAL, key: SearchKey = KEY, topology: Topology = ONE) -> str | None:
        kept = self.searches.find(key, consistency, topology)
        if kept is None:
            return None
        (result,) = pb.SearchMemoriesResponse.FromString(kept.encoded).results
        return result.memory.content


def session(lsn: int, shard_id: str = "a") -> Consistency:
    return Consistency(strong=False, positions={shard_id: Position(1, lsn)})


def test_results_are_found_as_fresh_as_is_asked_for() -> None:
    cache = Cache()
    assert cache.find() is None
    cache.remember(content="tea")
    for consistency in (EVENTUAL, session(100), Consistency(strong=False, max_staleness_ms=1_000)):
        assert cache.find(consistency) == "tea"
    cache.clock.pass_(2)
    for consistency in (STRONG, session(101), Consistency(strong=False, max_staleness_ms=1_000)):
        assert cache.find(consistency) is None
    assert cache.find(key=KEY._replace(user="another")) is None
    assert cache.find(key=KEY._replace(digest=b"another")) is None


def test_of_a_slot_that_has_moved_no_results_are_used_that_its_old_owner_gave() -> None:
    cache = Cache()
    cache.remember(cache.stamp(9_999))
    assert cache.find() is not None
    assert cache.find(topology=MOVED) is None
    assert cache.find(session(800, "b"), topology=MOVED) is None
    cache.remember(cache.stamp(650, shard_id="b"))
    assert cache.find(topology=MOVED) is not None
    # A token of before the move stands for the place of the cutover in the new owner's log.
    assert cache.find(session(1), topology=MOVED) is None
    cache.remember(cache.stamp(700, shard_id="b"))
    assert cache.find(session(1), topology=MOVED) is not None


def test_of_a_slot_that_has_come_back_no_results_of_before_are_used_for_who_wrote_meanwhile() -> None:
    cache = Cache()
    cache.remember(cache.stamp(600))
    assert cache.find(topology=RETURNED) is not None
    assert cache.find(session(800, "b"), topology=RETURNED) is None
    cache.remember(cache.stamp(900))
    assert cache.find(session(800, "b"), topology=RETURNED) is not None


def test_results_of_an_older_timeline_count_for_nothing_once_a_newer_one_is_known() -> None:
    cache = Cache()
    cache.remember(cache.stamp(100, timeline=1))
    assert cache.find() is not None
    cache.remember(cache.stamp(5, timeline=2), KEY._replace(digest=b"another"))
    assert cache.find() is None


@pytest.mark.parametrize("forget", ["wrote", "erase", "clear", "flush"])
def test_what_was_read_before_the_user_wrote_is_not_used_after_it(forget: str) -> None:
    cache = Cache()
    cache.remember()
    before = cache.stamp()
    {
        "wrote": lambda: cache.searches.user_wrote("user"),
        "erase": lambda: cache.searches.erase("user"),
        "clear": cache.searches.clear,
        "flush": cache.searches.flush,
    }[forget]()
    assert cache.find() is None
    cache.remember(before)
    cache.remember(cache.stamp(age_ms=500))
    assert cache.find() is None
    cache.remember()
    assert cache.find() is not None


def test_what_is_erased_is_not_in_memory_any_more() -> None:
    cache = Cache()
    cache.remember()
    cache.remember(key=KEY._replace(user="another"))
    cache.searches.erase("user")
    assert cache.searches.size[0] == 1
    assert cache.find(key=KEY._replace(user="another")) is not None


def test_results_are_over_when_the_first_of_them_expires() -> None:
    cache = Cache()
    cache.remember(expire_time={"seconds": int(time.time()) + 30})
    assert cache.find() is not None
    cache.clock.pass_(30)
    assert cache.find() is None
    cache.remember(embedding_state=pb.EMBEDDING_STATE_PENDING)
    assert cache.find() is None


def test_who_does_not_hear_the_others_remembers_nothing() -> None:
    cache = Cache()
    cache.believes = False
    cache.remember()
    cache.believes = True
    assert cache.find() is None
    assert not Cache(search_cache_bytes=0).searches.is_on


_embeddings = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=4)
_questions = st.builds(
    lambda user, k, words, embedding, minimum, include: shard_pb2.SearchRequest(
        user_id=user, k=k, words=words, embedding=embedding, min_score=minimum, include_embedding=include
    ),
    st.sampled_from(["a", "b"]),
    st.integers(1, 3),
    st.sampled_from(["", "tea"]),
    _embeddings,
    st.none() | st.floats(0, 1, width=32),
    st.booleans(),
)


@given(_questions, _questions, st.integers(0, 2), st.integers(0, 2))
def test_searches_share_results_only_if_they_ask_the_same(
    one: shard_pb2.SearchRequest, other: shard_pb2.SearchRequest, offset: int, other_offset: int
) -> None:
    same = (one.SerializeToString(deterministic=True), offset) == (
        other.SerializeToString(deterministic=True),
        other_offset,
    )
    keys = SearchKey.of("user", one, offset), SearchKey.of("user", other, other_offset)
    assert (keys[0] == keys[1]) is same


def test_a_filter_is_part_of_what_is_asked() -> None:
    def filtered(value: str) -> shard_pb2.SearchRequest:
        question = shard_pb2.SearchRequest(user_id="a", k=1)
        question.filter.comparison.field = "agent_id"
        question.filter.comparison.value.string_value = value
        return question

    keys = {SearchKey.of("user", question, 0) for question in (filtered("x"), filtered("y"), filtered("x"))}
    assert len(keys) == 2


def test_a_look_into_a_cache_that_is_off_is_no_miss() -> None:
    cache = Cache()
    cache.believes = False
    assert cache.find() is None
    assert cache.searches.layer.hit_ratio is None
    cache.believes = True
    assert cache.find() is None
    assert cache.searches.layer.hit_ratio == 0


def test_a_span_says_whether_a_search_was_remembered(spans: Spans) -> None:
    cache = Cache()
    said = []
    for _ in range(2):
        with spans.call() as span:
            cache.find()
        said.append(span.attributes["memshard.cache.hit"])
        cache.remember(content="tea")
    assert said == [False, True]
