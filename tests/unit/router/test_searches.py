"""Searching for one user: what is asked of the shard, and what is not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from common.config import RouterSettings
from common.deadline import Deadline
from common.level import Level
from memshard.v1 import memory_pb2 as pb
from router import searches
from router.consistency import EVENTUAL, STRONG, Consistency
from router.parts import Parts
from router.search_cache import SearchCache
from tests.support.eventually import eventually
from tests.unit.router.memories import cluster
from tests.unit.router.scripted import Server
from tests.unit.router.test_gets import getting

USER = "user-1"


@dataclass
class Searching:
    """A router's way to a primary, and what it remembers of searches."""

    primary: Server
    parts: Parts

    async def search(self, consistency: Consistency = EVENTUAL, *, seconds: float = 5, **fields: Any) -> str:
        """Who served it, once the answer is known to be this user's."""
        request = pb.SearchMemoriesRequest(**{"user_id": USER, "embedding": [0.5, 0, 0, 0], **fields})
        answer = await searches.search(self.parts, request, consistency, Deadline.after(seconds))
        assert [result.memory.user_id for result in answer.results] == [request.user_id]
        (served_by,) = answer.report.served_by
        return served_by

    def go(self, consistency: Consistency = EVENTUAL, **fields: Any) -> "asyncio.Task[str]":
        return asyncio.create_task(self.search(consistency, **fields))

    def set_level(self, level: Level) -> None:
        self.parts.levels.override({"shard-0": level})


@asynccontextmanager
async def searching(**settings: object) -> AsyncIterator[Searching]:
    configured = RouterSettings(catalog_dsn="postgresql://unused", **settings)  # type: ignore[arg-type]
    async with getting(**settings) as one:
        users: Any = SimpleNamespace(user=lambda user_id: user_id)
        results = SearchCache(configured, lambda: True)
        yield Searching(one.primary, replace(one.parts, cluster=cluster(), searches=results, remembered=users))


@pytest.mark.parametrize("level", [Level.REDUCED, Level.ESSENTIAL])
async def test_exact_results_are_used_at_every_level_and_those_of_an_index_at_none(level: Level) -> None:
    async with searching() as one:
        one.set_level(level)
        assert [await one.search() for _ in range(2)] == ["primary"] * 2
        one.set_level(Level.NORMAL)
        assert [await one.search() for _ in range(2)] == ["primary", "cache"]
        one.set_level(level)
        assert await one.search() == "cache"
        assert await one.search(STRONG) == "primary"
        assert [asked.index_suffices for asked in one.primary.searched] == [True, True, False, True]


async def test_what_an_index_may_have_found_is_not_remembered_though_the_level_ends_meanwhile() -> None:
    async with searching() as one:
        one.set_level(Level.REDUCED)
        one.primary.freeze()
        first = one.go()
        await eventually(lambda: one.primary.in_flight)
        one.set_level(Level.NORMAL)
        one.primary.thaw()
        assert await first == "primary"
        assert await one.search() == "primary"
