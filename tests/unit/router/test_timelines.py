"""After a failover, what was read before it counts for nothing as soon as anything says that there was one."""

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from common.config import RouterSettings
from common.errors import Unavailable
from common.topology import Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import EVENTUAL, STRONG, Position
from router.memories import Kept, MemoryCache, Question
from router.search_cache import KeptResults, SearchCache, SearchKey
from router.stamps import Stamp, Timelines
from router.tokens import Tokens
from tests.support.eventually import eventually
from tests.unit.router.scripted import Router, Server, router, servers

SHARD = "shard-0"
SLOT = 7
KEY = b"k" * 32
QUESTION = Question("user-1", str(uuid.uuid4()), include_embedding=False)
SEARCH = SearchKey("user", b"digest")


class Caches:
    """A router's memory, which has a memory and a search of timeline 1."""

    def __init__(self, timelines: Timelines, topology: Topology) -> None:
        settings = RouterSettings(catalog_dsn="postgresql://unused")  # type: ignore[arg-type]
        self._topology = topology
        self.memories = MemoryCache(settings, lambda: True, timelines=timelines)
        self.searches = SearchCache(settings, lambda: True, timelines=timelines)
        self.remember(Position(1, 100))
        self.find(Position(1, 100))
        assert self.has() == (True, True)

    def remember(self, position: Position) -> None:
        self.memories.remember(QUESTION, self._kept(position), pb.Memory())
        kept = self._kept(position)
        self.searches.remember(SEARCH, KeptResults(SLOT, b"", kept.stamp), pb.SearchMemoriesResponse())

    def find(self, position: Position) -> bool:
        """Whether what another layer has of this place would be answered."""
        return self.memories.may_answer(self._kept(position), QUESTION, EVENTUAL, self._topology)

    def has(self) -> tuple[bool, bool]:
        return (
            self.memories.find(QUESTION, EVENTUAL, self._topology) is not None,
            self.searches.find(SEARCH, EVENTUAL, self._topology) is not None,
        )

    def _kept(self, position: Position) -> Kept:
        return Kept("user-1", SLOT, b"", Stamp(SHARD, position, self.memories.now()))


@asynccontextmanager
async def watched(primary: Server, *replicas: Server) -> AsyncIterator[tuple[Router, Caches]]:
    async with router(primary, *replicas) as made:
        yield made, Caches(made.shards.timelines, made.topology)


def _receipt(tokens: Tokens) -> pb.WriteReceipt:
    return tokens.receipt((SHARD, shard_pb2.Commit(timeline=2, lsn=5)))


_SAID: dict[str, Callable[[Timelines, Caches], object]] = {
    "a commit": lambda timelines, _: _receipt(Tokens(KEY, timelines=timelines)),
    "a token of another router": lambda timelines, _: Tokens(KEY, timelines=timelines).said(
        pb.ReadOptions(consistency_tokens=[_receipt(Tokens(KEY)).consistency_token])
    ),
    "another layer": lambda _, caches: caches.find(Position(2, 5)),
}


@pytest.mark.parametrize("said", _SAID.values(), ids=_SAID.keys())
async def test_whatever_says_a_later_timeline_is_heard_by_all_that_is_remembered(
    said: Callable[[Timelines, Caches], object],
) -> None:
    async with Server("primary", writable=True) as primary, watched(primary) as (made, caches):
        said(made.shards.timelines, caches)
        assert caches.has() == (False, False)
        caches.remember(Position(1, 200))
        assert caches.has() == (False, False)
        caches.remember(Position(2, 6))
        assert caches.has() == (True, True)


async def test_what_a_memory_says_counts_for_searches_and_the_other_way_round() -> None:
    async with Server("primary", writable=True) as primary, watched(primary) as (made, one):
        other = Caches(made.shards.timelines, made.topology)
        kept = Stamp(SHARD, Position(2, 5), one.memories.now())
        one.memories.remember(QUESTION, Kept("user-1", SLOT, b"", kept), pb.Memory())
        assert other.has() == (False, False)
        kept = Stamp(SHARD, Position(3, 5), one.searches.now())
        other.searches.remember(SEARCH, KeptResults(SLOT, b"", kept), pb.SearchMemoriesResponse())
        assert one.has() == (False, False)


@pytest.mark.parametrize("promoted", [False, True])
async def test_a_replica_that_is_looked_at_says_so_also_once_it_is_the_primary(promoted: bool) -> None:
    async with servers(1) as (primary, (replica,)), watched(primary, replica) as (_, caches):
        await replica.move(Position(2, 5))
        replica.writable = promoted
        await eventually(lambda: caches.has() == (False, False))


async def test_a_primary_that_had_failed_says_so_when_it_is_looked_at() -> None:
    async with Server("primary", writable=True) as primary, watched(primary) as (made, caches):
        primary.error = Unavailable("not now", reason="DATABASE_UNAVAILABLE", retry_after_s=0.0)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await made.get(STRONG)
        assert caches.has() == (True, True)
        await primary.move(Position(2, 5))
        await eventually(lambda: caches.has() == (False, False))


async def test_a_server_of_another_cluster_says_nothing() -> None:
    async with servers(1) as (primary, (replica,)), watched(primary, replica) as (made, caches):
        replica.figures.cluster_id = "another"
        await made.knows()
        await replica.move(Position(2, 5))
        looks = replica.looks
        await eventually(lambda: replica.looks > looks + 1)
        assert caches.has() == (True, True)
