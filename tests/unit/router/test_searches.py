"""Searching for one user: what is asked of the shard, and what is not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from common import tracing
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import DeadlineExceeded, Unavailable
from common.level import Level
from memshard.v1 import memory_pb2 as pb
from router import searches
from router.consistency import EVENTUAL, STRONG, Consistency, Position
from router.parts import Parts
from router.search_cache import SearchCache
from tests.support.eventually import eventually
from tests.support.spans import Spans
from tests.unit.router.memories import cluster
from tests.unit.router.scripted import Server, apart
from tests.unit.router.test_gets import getting

USER = "user-1"
SESSION = Consistency(strong=False, positions={"shard-0": Position(1, 100)})


@dataclass
class Searching:
    """A router's way to a primary, and what it remembers of searches."""

    primary: Server
    parts: Parts

    async def answer(
        self, consistency: Consistency = EVENTUAL, *, seconds: float = 5, **fields: Any
    ) -> pb.SearchMemoriesResponse:
        """What it finds, which must be this user's."""
        request = pb.SearchMemoriesRequest(**{"user_id": USER, "embedding": [0.5, 0, 0, 0], **fields})
        answer = await searches.search(self.parts, request, consistency, Deadline.after(seconds))
        assert {result.memory.user_id for result in answer.results} <= {request.user_id}
        return answer

    async def search(self, consistency: Consistency = EVENTUAL, **fields: Any) -> str:
        """Who served it."""
        (served_by,) = (await self.answer(consistency, **fields)).report.served_by
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


@pytest.mark.parametrize("consistency", [EVENTUAL, SESSION])
async def test_those_who_search_for_the_same_at_once_share_one_look(
    consistency: Consistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has an answer of his own, and hears what is to be heard beside it."""
    trailers: list[str] = []
    monkeypatch.setattr(searches, "add_trailer", lambda name, value: trailers.append(f"{name}: {value}"))
    async with searching() as one:
        one.primary.unembedded = 3
        one.primary.freeze()
        callers = [asyncio.create_task(one.answer(consistency)) for _ in range(20)]
        await eventually(lambda: one.primary.in_flight)
        one.primary.thaw()
        answers = await asyncio.gather(*callers)
        assert one.primary.answered == 1
        assert trailers == [f"{searches.UNEMBEDDED_TRAILER}: 3"] * 20
        assert all(answer == answers[0] for answer in answers)
        assert list(answers[0].report.served_by) == ["primary"]
        answers[0].results[0].score = 0
        answers[0].report.Clear()
        assert [answer.results[0].score for answer in answers[1:]] == [0.5] * 19
        assert all(answer.report.served_by for answer in answers[1:])
        # What is to be embedded is found soon, without anybody saying so.
        assert await one.search(consistency) == "primary"


async def test_what_is_found_together_is_remembered_once_though_the_first_has_left() -> None:
    async with searching() as one:
        one.primary.freeze()
        first, second = one.go(), one.go()
        await eventually(lambda: one.primary.in_flight)
        first.cancel()
        await asyncio.wait([first])
        one.primary.thaw()
        assert await second == "primary"
        assert await one.search() == "cache"
        assert one.primary.answered == 1


async def test_those_who_search_otherwise_do_not_share() -> None:
    async with searching() as one:
        one.primary.freeze()
        callers = [
            one.go(),
            one.go(SESSION),
            one.go(user_id="user-2"),
            one.go(embedding=[0, 0.5, 0, 0]),
            one.go(limit=1),
            one.go(offset=1),
            *(one.go(STRONG) for _ in range(3)),
        ]
        await eventually(lambda: one.primary.in_flight == len(callers))
        one.set_level(Level.REDUCED)
        callers.append(one.go())
        await eventually(lambda: one.primary.in_flight == len(callers))
        one.primary.thaw()
        assert await asyncio.gather(*callers) == ["primary"] * len(callers)


async def test_who_searches_after_a_write_has_no_results_of_before_it() -> None:
    async with searching() as one:
        one.primary.freeze()
        before = one.go()
        await eventually(lambda: one.primary.in_flight == 1)
        one.parts.searches.user_wrote(USER)
        after = [one.go() for _ in range(3)]
        await eventually(lambda: one.primary.in_flight == 2)
        one.primary.thaw()
        await asyncio.gather(before, *after)
        assert one.primary.answered == 2


async def test_a_bound_is_that_of_each_who_searches() -> None:
    """What the first began half a second ago is too old for who comes now."""
    async with searching() as one:
        bounded = Consistency(strong=False, max_staleness_ms=300)
        assert set(await apart(one.primary, lambda: one.go(bounded))) == {"primary"}
        assert one.primary.answered == 2


async def test_who_has_little_time_to_search_takes_none_from_who_has_more() -> None:
    async with searching() as one:
        one.primary.freeze()
        hasty = one.go(seconds=0.2)
        await eventually(lambda: one.primary.searched)
        patient = one.go(seconds=10)
        with pytest.raises((DeadlineExceeded, Unavailable, TimeoutError)):
            await hasty
        one.primary.thaw()
        assert await patient == "primary"


LEVEL = "memshard.degradation.level"


async def test_the_level_in_a_trace_of_who_waited_is_that_of_the_shard_that_answers(spans: Spans) -> None:
    async with searching() as one:
        one.set_level(Level.ESSENTIAL)

        async def level() -> tracing.Value:
            with spans.call() as root:
                await one.search()
            return root.attributes[LEVEL]

        one.primary.freeze()
        both = [asyncio.create_task(level()) for _ in range(2)]
        await eventually(lambda: one.primary.in_flight)
        one.primary.thaw()
        assert await asyncio.gather(*both) == ["essential"] * 2
        assert one.primary.answered == 1
