"""Memories that a router remembers: whose they are, how fresh they must be, and what makes it forget them."""

import time
import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from common.config import RouterSettings
from common.slots import SLOT_COUNT
from common.telemetry.registry import REGISTRY
from common.topology import Cutover, Shard, SlotRange, Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import EVENTUAL, STRONG, Consistency, Position
from router.memories import Kept, MemoryCache, Question
from router.stamps import Stamp
from tests.support.clock import Clock
from tests.unit.router.memories import memory

ID = str(uuid.uuid4())
SLOT = 7
ONE = Topology("c", 1, (Shard("a", "a:1"), Shard("b", "b:1")), (SlotRange(0, SLOT_COUNT - 1, "a"),))
MOVED = replace(
    ONE,
    epoch=2,
    ranges=(SlotRange(0, SLOT, "b"), SlotRange(SLOT + 1, SLOT_COUNT - 1, "a")),
    cutovers=(Cutover("a", "b", 1, 700),),
)


def session(**positions: tuple[int, int]) -> Consistency:
    return Consistency(strong=False, positions={name: Position(*place) for name, place in positions.items()})


def bounded(milliseconds: int) -> Consistency:
    return Consistency(strong=False, max_staleness_ms=milliseconds)


class Cache:
    """One in the test's own time."""

    def __init__(self, **settings: float) -> None:
        self.clock = Clock()
        self.believes = True
        self.memories = MemoryCache(
            RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"), **settings),  # type: ignore[arg-type]
            lambda: self.believes,
            self.clock,
        )

    def stamp(self, lsn: int = 100, *, timeline: int = 1, age_ms: int = 0, shard_id: str = "a") -> Stamp:
        said = shard_pb2.ReadStamp(timeline=timeline, lsn=lsn, age_ms=age_ms)
        return Stamp.of_answer(shard_id, said, self.memories.now())

    def remember(self, stamp: Stamp | None = None, *, include_embedding: bool = False, **fields: object) -> None:
        fields = {"id": ID, "expire_time": None, "embedding_state": pb.EMBEDDING_STATE_READY, **fields}
        self.clock.pass_(0.001)
        stamp = stamp or self.stamp()
        read = memory(**fields)
        encoded = pb.GetMemoryResponse(memory=read).SerializeToString()
        question = Question(read.user_id, read.id, include_embedding)
        self.memories.remember(question, Kept(read.user_id, SLOT, encoded, stamp), read)
        self.clock.pass_(0.001)

    def find(
        self,
        consistency: Consistency = EVENTUAL,
        *,
        user: str = "user-1",
        include_embedding: bool = False,
        topology: Topology = ONE,
    ) -> Kept | None:
        return self.memories.find(Question(user, ID, include_embedding), consistency, topology)


def content(kept: Kept | None) -> str:
    assert kept is not None
    return pb.GetMemoryResponse.FromString(kept.encoded).memory.content


def test_a_memory_is_found_as_it_was_read() -> None:
    cache = Cache()
    assert cache.find() is None
    cache.remember(content="tea")
    assert content(cache.find()) == "tea"


def test_nobody_finds_what_is_anothers() -> None:
    cache = Cache()
    cache.remember()
    for other in ("user-2", "user-", "user-1 ", "USER-1", ""):
        assert cache.find(user=other) is None
    cache.remember(user_id="user-2", content="of the other")
    assert cache.find() is None
    assert content(cache.find(user="user-2")) == "of the other"


def test_an_embedding_is_there_only_for_those_who_ask_for_it() -> None:
    cache = Cache()
    cache.remember(include_embedding=True)
    assert cache.find() is None
    assert cache.find(include_embedding=True) is not None
    cache.remember()
    assert cache.find() is not None


@pytest.mark.parametrize(
    ("consistency", "fresh_enough"),
    [
        (STRONG, False),
        (EVENTUAL, True),
        (session(), True),
        (session(a=(1, 99)), True),
        (session(a=(1, 100)), True),
        (session(a=(1, 101)), False),
        (session(a=(2, 1)), False),
        (session(b=(9, 900)), True),
    ],
)
def test_a_session_is_not_answered_with_what_is_older_than_its_token(
    consistency: Consistency, fresh_enough: bool
) -> None:
    cache = Cache()
    cache.remember(cache.stamp(100))
    assert (cache.find(consistency) is not None) is fresh_enough


def test_bounded_staleness_is_the_age_of_what_is_remembered() -> None:
    cache = Cache()
    cache.remember(cache.stamp(age_ms=500))
    assert cache.find(bounded(499)) is None
    assert cache.find(bounded(1_000)) is not None
    cache.clock.pass_(1)
    assert cache.find(bounded(1_000)) is None
    assert cache.find(bounded(2_000)) is not None


def test_what_is_read_anew_takes_the_place_of_what_is_older_and_not_of_what_is_newer() -> None:
    cache = Cache()
    cache.remember(cache.stamp(100), content="tea")
    cache.remember(cache.stamp(200), content="coffee")
    cache.remember(cache.stamp(150), content="tea")
    assert content(cache.find(session(a=(1, 200)))) == "coffee"


def test_it_is_forgotten_after_its_time_and_before_its_expiry() -> None:
    cache = Cache(memory_cache_ttl_s=60)
    cache.remember()
    cache.clock.pass_(59)
    assert cache.find() is not None
    cache.clock.pass_(2)
    assert cache.find() is None
    cache.remember(expire_time={"seconds": int(time.time()) + 30})
    assert cache.find() is not None
    cache.clock.pass_(30)
    assert cache.find() is None
    cache.remember(expire_time={"seconds": int(time.time())})
    assert cache.find() is None


def test_what_has_no_embedding_yet_is_not_remembered() -> None:
    """It gets one without anybody being told."""
    cache = Cache()
    cache.remember(embedding_state=pb.EMBEDDING_STATE_PENDING)
    assert cache.find() is None


@pytest.mark.parametrize("forget", ["drop", "clear", "flush"])
def test_what_was_read_before_a_forgetting_is_not_remembered_after_it(forget: str) -> None:
    cache = Cache()
    cache.remember()
    before = cache.stamp()
    {"drop": lambda: cache.memories.drop([ID]), "clear": cache.memories.clear, "flush": cache.memories.flush}[forget]()
    assert cache.find() is None
    cache.remember(before)
    assert cache.find() is None
    cache.remember()
    assert cache.find() is not None


def test_what_a_replica_had_before_a_forgetting_is_not_remembered_after_it() -> None:
    """It is asked afterwards, and does not know yet."""
    cache = Cache()
    cache.memories.drop([ID])
    cache.clock.pass_(0.4)
    cache.remember(cache.stamp(age_ms=500))
    assert cache.find() is None
    cache.clock.pass_(0.2)
    cache.remember(cache.stamp(age_ms=500))
    assert cache.find() is not None


def test_who_does_not_hear_the_others_remembers_nothing() -> None:
    cache = Cache()
    cache.remember()
    cache.believes = False
    assert cache.find() is None
    cache.remember()
    cache.memories.clear()
    cache.believes = True
    assert cache.find() is None


def test_without_room_it_is_off() -> None:
    cache = Cache(memory_cache_bytes=0)
    cache.remember()
    assert not cache.memories.is_on
    assert cache.find() is None


def test_of_a_slot_that_has_moved_nothing_is_answered_that_its_old_owner_said() -> None:
    cache = Cache()
    cache.remember(cache.stamp(9_999))
    assert cache.find(topology=MOVED) is None
    cache.remember(cache.stamp(650, shard_id="b"))
    assert cache.find(topology=MOVED) is not None
    # A token of before the move stands for the place of the cutover in the new owner's log.
    assert cache.find(session(a=(1, 1)), topology=MOVED) is None
    cache.remember(cache.stamp(700, shard_id="b"))
    assert cache.find(session(a=(1, 1)), topology=MOVED) is not None


def test_what_is_of_an_older_timeline_counts_for_nothing_once_a_newer_one_is_known() -> None:
    cache = Cache()
    cache.remember(cache.stamp(100, timeline=1))
    assert cache.find() is not None
    cache.remember(cache.stamp(5, timeline=2), id=str(uuid.uuid4()))
    assert cache.find() is None


_versions = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "late read", "lose a message", "look"]), st.integers(0, 3), st.integers(0, 5)
    ),
    max_size=60,
)


@given(_versions)
def test_no_session_finds_less_than_its_token_says_whatever_is_lost_on_the_way(
    steps: list[tuple[str, int, int]],
) -> None:
    """A memory is written again and again; each write is a version and a position, and others may not hear of it."""
    cache = Cache()
    position, version = 10, 0
    tokens = [(position, version)]
    under_way: list[tuple[Stamp, int]] = []
    for step, back, later in steps:
        if step in ("write", "lose a message"):
            position, version = position + 1 + later, version + 1
            tokens.append((position, version))
            if step == "write":
                cache.memories.drop([ID])
        elif step == "read":
            under_way.append((cache.stamp(position), version))
        elif step == "late read" and under_way:
            stamp, seen = under_way.pop(min(back, len(under_way) - 1))
            cache.remember(stamp, content=f"version {seen}")
        else:
            token, least = tokens[-1 - min(back, len(tokens) - 1)]
            kept = cache.find(session(a=(1, token)))
            assert kept is None or int(content(kept).removeprefix("version ")) >= least
        cache.clock.pass_(0.01)


def looks() -> float:
    """How often anybody has looked into this layer, whatever was found."""
    results = ("hit", "miss", "unavailable")
    name = "memory_cache_requests_total"
    return sum(REGISTRY.get_sample_value(name, {"layer": "memories", "result": result}) or 0 for result in results)


def test_a_look_into_a_cache_that_is_off_is_no_miss() -> None:
    cache, before = Cache(), looks()
    cache.believes = False
    assert cache.find() is None
    assert looks() == before
    assert cache.memories.layer.hit_ratio is None
    cache.believes = True
    assert cache.find() is None
    assert looks() == before + 1
    assert cache.memories.layer.hit_ratio == 0
