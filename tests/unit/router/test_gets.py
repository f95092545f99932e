"""Fetching one memory: what is asked of the shard, and what several who ask at once have of one answer."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from common import tracing
from common.catalog import PlacementStrategy
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import DeadlineExceeded, Unavailable
from common.level import Level
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router import gets
from router.consistency import EVENTUAL, STRONG, Consistency, Position
from router.envelope import Envelopes
from router.memories import MemoryCache, Question
from router.memories_redis import MemoryRedis
from router.parts import Parts
from router.place import Placement
from router.redis_cache import RedisCache
from router.retries import Retries
from router.scatter import Scatter, Sending
from router.shards import GET, STORE
from router.single_flight import SingleFlight
from tests.support.eventually import eventually
from tests.support.spans import Spans
from tests.unit.router.scripted import CLUSTER_ID, Server, apart, router

QUESTION = Question("user-1", str(uuid.uuid4()), include_embedding=False)
SESSION = Consistency(strong=False, positions={"shard-0": Position(1, 100)})


@dataclass
class Getting:
    """A router's way to a primary, and what it remembers."""

    primary: Server
    parts: Parts

    async def get(
        self, consistency: Consistency, question: Question = QUESTION, *, seconds: float = 5
    ) -> tuple[str, str]:
        """Whose the memory is, and who served it."""
        encoded = await gets.get(self.parts, question, consistency, Deadline.after(seconds))
        answer = pb.GetMemoryResponse.FromString(encoded)
        (served_by,) = answer.report.served_by
        return answer.memory.user_id, served_by

    def go(
        self, consistency: Consistency, question: Question = QUESTION, *, seconds: float = 5
    ) -> "asyncio.Task[tuple[str, str]]":
        return asyncio.create_task(self.get(consistency, question, seconds=seconds))


@asynccontextmanager
async def getting(**settings: object) -> AsyncIterator[Getting]:
    configured = RouterSettings(catalog_dsn="postgresql://unused", **settings)  # type: ignore[arg-type]
    async with Server("primary", writable=True) as primary, router(primary) as made:
        memories, link = MemoryCache(configured, lambda: True), RedisCache(configured)
        others: Any = SimpleNamespace()
        watch: Any = SimpleNamespace(topology=made.topology)
        parts = Parts(
            cluster=others,
            placement=Placement(PlacementStrategy.USER_BASED),
            embedding=others,
            dispatch=made.dispatch,
            request_ids=others,
            scatter=Scatter(watch, made.shards, Retries()),
            fanout=made.fanout,
            locations=others,
            memories=memories,
            memories_redis=MemoryRedis(configured, link, Envelopes(b"k" * 32), CLUSTER_ID, memories),
            searches=others,
            flights=SingleFlight(),
            remembered=others,
            invalidations=others,
            levels=made.shards.levels,
            tokens=others,
            watch=watch,
        )
        try:
            yield Getting(primary, parts)
        finally:
            await link.close()


async def test_what_was_got_is_not_asked_for_again() -> None:
    async with getting() as one:
        assert await one.get(STRONG) == ("user-1", "primary")
        for consistency in (EVENTUAL, SESSION):
            assert await one.get(consistency) == ("user-1", "cache")
        assert await one.get(STRONG) == ("user-1", "primary")
        assert one.primary.answered == 2
        later = Consistency(strong=False, positions={"shard-0": Position(1, 101)})
        await one.primary.move(Position(1, 101))
        assert await one.get(later) == ("user-1", "primary")
        assert await one.get(later) == ("user-1", "cache")


@pytest.mark.parametrize("consistency", [EVENTUAL, SESSION])
async def test_those_who_ask_the_same_at_once_share_one_answer(consistency: Consistency) -> None:
    async with getting(memory_cache_bytes=0) as one:
        one.primary.freeze()
        callers = [one.go(consistency) for _ in range(20)]
        await eventually(lambda: one.primary.in_flight)
        one.primary.thaw()
        assert await asyncio.gather(*callers) == [("user-1", "primary")] * 20
        assert one.primary.answered == 1


async def test_those_who_ask_for_something_else_do_not() -> None:
    async with getting(memory_cache_bytes=0) as one:
        one.primary.freeze()
        callers = [
            one.go(EVENTUAL),
            one.go(SESSION),
            one.go(Consistency(strong=False, positions={"shard-0": Position(1, 99)})),
            one.go(EVENTUAL, QUESTION._replace(user_id="user-2")),
            one.go(EVENTUAL, QUESTION._replace(memory_id=str(uuid.uuid4()))),
            one.go(EVENTUAL, QUESTION._replace(include_embedding=True)),
            *(one.go(STRONG) for _ in range(3)),
        ]
        await eventually(lambda: one.primary.in_flight == len(callers))
        one.primary.thaw()
        users = [user for user, _ in await asyncio.gather(*callers)]
        assert users == ["user-1"] * 3 + ["user-2"] + ["user-1"] * 5


async def test_who_asks_after_a_change_has_no_answer_of_before_it() -> None:
    async with getting() as one:
        one.primary.freeze()
        before = one.go(EVENTUAL)
        await eventually(lambda: one.primary.in_flight == 1)
        one.parts.memories.drop([QUESTION.memory_id])
        after = one.go(EVENTUAL)
        await eventually(lambda: one.primary.in_flight == 2)
        one.primary.thaw()
        await asyncio.gather(before, after)
        assert one.primary.answered == 2


async def test_a_bound_is_that_of_each_who_asks() -> None:
    """What the first began half a second ago is too old for who comes now."""
    async with getting(memory_cache_bytes=0) as one:
        bounded = Consistency(strong=False, max_staleness_ms=300)
        assert set(await apart(one.primary, lambda: one.go(bounded))) == {("user-1", "primary")}
        assert one.primary.answered == 2


async def test_who_leaves_takes_nothing_from_the_others() -> None:
    async with getting(memory_cache_bytes=0) as one:
        one.primary.freeze()
        first, second = one.go(EVENTUAL), one.go(EVENTUAL)
        await eventually(lambda: one.primary.in_flight)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        one.primary.thaw()
        assert await second == ("user-1", "primary")
        assert one.primary.answered == 1


async def test_who_has_little_time_takes_none_from_who_has_more() -> None:
    async with getting(memory_cache_bytes=0) as one:
        one.primary.freeze()
        hasty = one.go(EVENTUAL, seconds=0.2)
        await eventually(lambda: one.primary.asked)
        patient = one.go(EVENTUAL, seconds=10)
        with pytest.raises((DeadlineExceeded, Unavailable, TimeoutError)):
            await hasty
        one.primary.thaw()
        assert await patient == ("user-1", "primary")


@pytest.mark.parametrize("first_leaves", [False, True])
async def test_who_shares_a_read_has_a_trace_that_leads_to_what_became_of_it(spans: Spans, first_leaves: bool) -> None:
    """Though the first is not sampled, and may be gone before it is known."""
    async with getting(memory_cache_bytes=0) as one:
        roots: list[tracing.Span] = []

        async def traced(*, sampled: bool) -> None:
            with spans.call(sampled=sampled) as root:
                roots.append(root)
                await one.get(EVENTUAL)

        one.primary.freeze()
        first = asyncio.create_task(traced(sampled=False))
        await eventually(lambda: one.primary.in_flight)
        others = [asyncio.create_task(traced(sampled=True)) for _ in range(2)]
        await eventually(lambda: len(roots) == 3)
        if first_leaves:
            first.cancel()
            await asyncio.wait([first])
        one.primary.fails_next = 1
        one.primary.thaw()
        await asyncio.gather(*others)
        await asyncio.wait([first])
        assert one.primary.answered == 1
    parts = {trace.spans[0]: trace.spans[1:] for trace in spans.kept}
    began, *joined = roots
    for root in joined:
        (wait,) = parts[root]
        assert wait.name == "wait for the same read"
        assert wait.links == ((int(began.trace_id, 16), began.span_id),)
    # The attempt that failed, and the one that did not: both were waited for to their end.
    attempts = parts[began]
    assert [span.attributes.get("error.type") for span in attempts] == ["DATABASE_UNAVAILABLE", None]
    assert not any(span.attributes.keys() & {"memshard.abandoned", "memshard.cancelled"} for span in attempts)
    assert [name for name, _, _ in began.events] == ["retry"]
    assert began.attributes.get("memshard.cancelled", False) is first_leaves


async def test_a_read_that_nobody_waits_for_any_more_ends_with_the_call_that_began_it(spans: Spans) -> None:
    async with getting(memory_cache_bytes=0) as one:

        async def traced() -> None:
            with spans.call():
                await one.get(EVENTUAL)

        one.primary.freeze()
        alone = asyncio.create_task(traced())
        await eventually(lambda: one.primary.in_flight)
        alone.cancel()
        await asyncio.wait([alone])
        # At once, and not when the shard notices.
        ((root, attempt),) = [trace.spans for trace in spans.kept]
        assert root.attributes["memshard.cancelled"] is True
        assert attempt.attributes["memshard.abandoned"] is True


LEVEL = "memshard.degradation.level"


async def test_the_level_in_a_trace_is_that_of_the_shard_that_answers(spans: Spans) -> None:
    async with getting() as one:
        one.parts.levels.override({"shard-0": Level.ESSENTIAL})

        async def level_of(call: Awaitable[object]) -> tracing.Value:
            with spans.call() as root:
                one.parts.levels.tell_trace()
                assert root.attributes[LEVEL] == "normal"
                await call
            return root.attributes[LEVEL]

        # Of one who began the read, one who waited for it, and one who was answered from memory.
        one.primary.freeze()
        both = [asyncio.create_task(level_of(one.get(EVENTUAL))) for _ in range(2)]
        await eventually(lambda: one.primary.in_flight)
        one.primary.thaw()
        assert await asyncio.gather(*both) == ["essential"] * 2
        assert one.primary.answered == 1
        assert await level_of(one.get(EVENTUAL)) == "essential"
        assert one.primary.answered == 1
        # Of one whose shard fails; of a write; and of what all shards are asked.
        one.primary.error = Unavailable("not now", reason="DATABASE_UNAVAILABLE", retry_after_s=0.0)
        with spans.call() as failed, pytest.raises(Unavailable):
            await one.get(STRONG)
        assert failed.attributes[LEVEL] == "essential"
        one.primary.error = None
        store, get, deadline = shard_pb2.StoreRequest(), shard_pb2.GetRequest(), Deadline.after(5)
        assert await level_of(one.parts.dispatch.to_owner(0, STORE, store, deadline)) == "essential"
        assert await level_of(one.parts.fanout.ask_all(GET, get, deadline)) == "essential"
        sending: Sending[int, Any, Any] = Sending(STORE, lambda slot: slot, lambda _: store, lambda _: [None])
        assert await level_of(one.parts.scatter.send(sending, [7], deadline)) == "essential"
