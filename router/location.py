"""The location cache: memory id → slots. Router memory first, then Redis; both may be empty, stale or wrong.

It maps to slots, never to shards: slots move, a memory's slot does not. Usually an id has one slot; ids are unique per
user only, so it may have several. What is found here is only where to look first, so a wrong entry costs a second
look, and a Redis that is slow or dead costs at most its timeout, and after a few calls nothing at all.

What is erased is to be gone from here too, whatever is under way meanwhile. So nothing is written that was learnt
before an erasure of which this router has heard since (`Moment.forgettings`), nor, in Redis, before one of which it has
not (`Moment.era`, which each erasure changes there).
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import UUID

from cachetools import TTLCache
from redis.asyncio import Redis

from common import tracing
from common.breaker import CircuitBreaker
from common.config import RouterSettings
from common.deadline import Deadline
from common.gathering import Gathering
from common.slots import SLOT_COUNT
from router.cache_layer import CacheLayer, Result
from router.redis_cache import SILENCE, RedisCache

Slots = frozenset[int]
NOWHERE: Slots = frozenset()

# An entry with more is not one of ours, or not worth following one by one.
_MAX_SLOTS = 8
# Keys in one command: some milliseconds of Redis' one thread.
_MAX_KEYS = 1000
# What this many entries are written for may share a command with fifty others.
_FEW_KEYS = 20

_JUST_NOW_MS = 60_000
_CLOCK_SKEW_MS = 5_000

# Entries (KEYS 2 and following) in one era (KEYS 1); answers what they were before. In another era they are dropped:
# what is there may lack what could not be written.
_WRITE = """
local current = redis.call('GET', KEYS[1]) == ARGV[1]
local before = {}
for number = 2, #KEYS do
    before[number - 1] = redis.call('GET', KEYS[number])
    if current then
        redis.call('SET', KEYS[number], ARGV[number + 1], 'EX', ARGV[2])
    else
        redis.call('DEL', KEYS[number])
    end
end
return before
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """How far this router had heard of what is to be forgotten, when something began."""

    forgettings: int
    era: bytes


@dataclass(frozen=True, slots=True)
class _Kept:
    """Entries to write in one era."""

    entries: Mapping[str, Slots]
    era: bytes


# The era of a router that does not hear the others, which is none of Redis'.
_UNKNOWN = b""


def _always() -> bool:
    return True


class LocationCache:
    """Where memories are, as far as this router and Redis remember. No method raises for what Redis does.

    `believes` says whether this router has heard all that others told it to forget; while it has not, its own memory
    counts for nothing.
    """

    def __init__(
        self,
        settings: RouterSettings,
        cluster_id: str = "",
        believes: Callable[[], bool] = _always,
        link: RedisCache | None = None,
    ) -> None:
        self._believes = believes
        self._forgettings = 0
        self._era = _UNKNOWN
        self._era_key = era_key(cluster_id)
        self._memory: TTLCache[str, Slots] = TTLCache(settings.location_cache_entries, settings.location_cache_ttl_s)
        self._ttl_s = settings.location_redis_ttl_s
        self._timeout_s = settings.redis_timeout_s
        self._link = link or RedisCache(settings)
        self._write = self._link.redis.register_script(_WRITE) if self._link.redis is not None else None
        self._keeping = Gathering("tell Redis together", self._keep_alone, self._keep_together)
        self._of_memory, self._of_redis = CacheLayer("memory"), CacheLayer("redis")

    async def find(self, memory_id: str) -> Slots:
        """The slots where a memory with this id was last known; empty when nothing is known.

        This is what is counted: the look of a read, into each layer that is on.
        """
        slots, is_on = self._recall(memory_id), self._is_on
        if is_on:
            self._of_memory.looked("hit" if slots else "miss")
        if not slots and self.is_shared:
            slots, result = await self._look_into_redis(memory_id)
            self._of_redis.looked(result)
        if is_on or self.is_shared:
            tracing.current().set("memshard.cache.hit", bool(slots))
        return slots

    def moment(self) -> Moment:
        """To be taken before something is read or written whose place is to be remembered."""
        return Moment(self._forgettings, self._era)

    def hear_era(self, era: bytes) -> None:
        """What era it is in Redis."""
        self._era = era

    async def learn(self, memory_id: str, slots: Slots, *, since: Moment) -> None:
        """Remembers where a memory is, as all shards together just said; not if there was a forgetting `since`."""
        if since.forgettings == self._forgettings:
            self._remember(memory_id, slots, since)
            await self._keep({memory_id: slots}, since)

    async def add(self, memory_id: str, slot: int, *, since: Moment) -> bool:
        """Remembers where a memory was just stored, besides wherever another user has one with the same id.

        An id that was made just now is nobody else's, so this is all there is to know of it. An older one may be
        others' too, without anything being known of that here: then what is known is added to, and nothing is made up.
        `since` is a moment before the store. Returns whether other routers may know the id, as another user's alone.
        """
        if made_just_now(memory_id):
            return bool(await self.add_many([(memory_id, slot)], since=since))
        known = self._recall(memory_id) or (await self._look_into_redis(memory_id))[0]
        await (self.learn(memory_id, known | {slot}, since=since) if known else self.forget(memory_id))
        return True

    async def add_many(self, stored: Sequence[tuple[str, int]], *, since: Moment) -> list[str]:
        """The same for the memories of a batch, in one exchange with Redis. Of older ids nothing is kept at all.

        Returns the ids that other routers may know as another user's alone.
        """
        fresh: dict[str, Slots] = {}
        for memory_id, slot in stored:
            if made_just_now(memory_id):
                fresh[memory_id] = fresh.get(memory_id, NOWHERE) | {slot}
        for memory_id, here in fresh.items():
            self._remember(memory_id, self._recall(memory_id) | here, since)
        others: dict[str, None] = {}
        for memory_id, before in (await self._keep(fresh, since)).items():
            if before - fresh[memory_id]:
                await self.learn(memory_id, before | fresh[memory_id], since=since)
                others[memory_id] = None
        older = [memory_id for memory_id, _ in stored if memory_id not in fresh]
        if older:
            await self.forget_many(older)
        return [*others, *older]

    def drop(self, memory_ids: Sequence[str]) -> None:
        """Drops locations from this router's memory alone."""
        self._forgettings += 1
        for memory_id in memory_ids:
            self._memory.pop(memory_id, None)

    def clear(self) -> None:
        """Drops everything from this router's memory."""
        self._forgettings += 1
        self._era = _UNKNOWN
        self._memory.clear()

    async def forget_many(self, memory_ids: Sequence[str]) -> None:
        """Drops what is known of many memories."""
        for memory_id in memory_ids:
            self._memory.pop(memory_id, None)
        await self._link.ask(lambda redis: self.drop_from_redis(redis, memory_ids))

    @staticmethod
    async def drop_from_redis(redis: Redis, memory_ids: Sequence[str]) -> None:
        """Drops locations from Redis. Raises what its client raises."""
        for start in range(0, len(memory_ids), _MAX_KEYS):
            await redis.delete(*(_key(memory_id) for memory_id in memory_ids[start : start + _MAX_KEYS]))

    async def forget(self, memory_id: str) -> None:
        """Drops what is known of a memory."""
        self._memory.pop(memory_id, None)
        await self._link.ask(lambda redis: redis.delete(_key(memory_id)))

    @property
    def layers(self) -> tuple[CacheLayer, ...]:
        """What there is, in the order in which it is asked."""
        return (self._of_memory, self._of_redis) if self.is_shared else (self._of_memory,)

    @property
    def breaker(self) -> CircuitBreaker:
        """That of Redis."""
        return self._link.breaker

    @property
    def is_shared(self) -> bool:
        """Whether there is a Redis."""
        return self._link.redis is not None

    @property
    def is_believed(self) -> bool:
        """Whether what this router remembers is used."""
        return self._believes()

    @property
    def size(self) -> tuple[int, int]:
        """How many locations this router remembers, and how many it may."""
        return len(self._memory), int(self._memory.maxsize)

    async def ping(self) -> None:
        """Asks Redis whether it is there, whatever its breaker says, which hears of it. Raises Unavailable."""
        await self._link.ping()

    def flush(self) -> int:
        """Forgets all that this router remembers, and goes on remembering; how much that was."""
        self._forgettings += 1
        count = len(self._memory)
        self._memory.clear()
        return count

    async def close(self) -> None:
        """Closes the connections to Redis."""
        await self._link.close()

    @property
    def _is_on(self) -> bool:
        """Whether this router itself remembers anything at the moment."""
        return bool(self._memory.maxsize) and self._believes()

    async def _look_into_redis(self, memory_id: str) -> tuple[Slots, Result]:
        """What Redis has, which is remembered; and what became of the look."""
        if not self.is_shared:
            return NOWHERE, "unavailable"
        with tracing.span("look into Redis", {"memshard.cache.layer": self._of_redis.name}) as span:
            began = self.moment()
            reply = await self._link.ask(lambda redis: redis.get(_key(memory_id)))
            slots = parse(reply)
            span.set("memshard.cache.hit", bool(slots))
        if slots:
            self._remember(memory_id, slots, began)
        return slots, "hit" if slots else "unavailable" if reply is SILENCE else "miss"

    def _recall(self, memory_id: str) -> Slots:
        return self._memory.get(memory_id, NOWHERE) if self._believes() else NOWHERE

    def _remember(self, memory_id: str, slots: Slots, since: Moment) -> None:
        # A cache of no entries refuses the first with an error.
        if self._is_on and since.forgettings == self._forgettings:
            self._memory[memory_id] = slots

    async def _keep(self, entries: Mapping[str, Slots], since: Moment) -> dict[str, Slots]:
        """Writes entries to Redis, if nothing was erased `since`; what each was before, as far as Redis says.

        Of a few entries, together with those of others who come at the same time: an exchange with Redis costs this
        process more than Redis itself.
        """
        if not entries or self._write is None:
            return {}
        wanted = _Kept(entries, since.era)
        if len(entries) > _FEW_KEYS:
            return await self._keep_alone(wanted)
        return await self._keeping.serve(wanted, Deadline.after(self._timeout_s))

    async def _keep_alone(self, wanted: "_Kept", _: Deadline | None = None) -> dict[str, Slots]:
        (before,) = await self._keep_together([wanted])
        return before or {}

    async def _keep_together(
        self, wanted: Sequence["_Kept"], _: Deadline | None = None
    ) -> list[dict[str, Slots] | None]:
        """Of those that are of the first one's era, what each entry was before; None for the others."""
        era = wanted[0].era
        together = [(memory_id, slots) for one in wanted if one.era == era for memory_id, slots in one.entries.items()]
        keys = [self._era_key, *(_key(memory_id) for memory_id, _ in together)]
        arguments: list[Any] = [era, self._ttl_s, *(render(slots) for _, slots in together)]
        write = self._write
        assert write is not None
        replies = await self._link.ask(lambda _: write(keys=keys, args=arguments))
        # A list of another length is an answer to something else: nothing is known by it.
        before = map(parse, replies) if isinstance(replies, list) and len(replies) == len(together) else None
        return [
            None
            if one.era != era
            else dict(zip(one.entries, islice(before, len(one.entries)), strict=True))
            if before is not None
            else {}
            for one in wanted
        ]


def made_just_now(memory_id: str) -> bool:
    """Whether this is a UUIDv7 of the last minute, by this machine's clock."""
    made = UUID(memory_id)
    age_ms = time.time_ns() // 1_000_000 - (made.int >> 80)
    return made.version == 7 and -_CLOCK_SKEW_MS <= age_ms <= _JUST_NOW_MS


def parse(reply: object) -> Slots:
    """The slots of an entry; none for anything that is not an entry of ours."""
    if not isinstance(reply, bytes):
        return NOWHERE
    parts = reply.split(b",")
    if len(parts) > _MAX_SLOTS or not all(part.isdigit() and len(part) <= 5 for part in parts):
        return NOWHERE
    slots = frozenset(map(int, parts))
    return slots if max(slots) < SLOT_COUNT else NOWHERE


def render(slots: Iterable[int]) -> str:
    """An entry: slots in decimal, ascending, with commas between them."""
    return ",".join(map(str, sorted(slots)))


def era_key(cluster_id: str) -> str:
    """Where Redis has the era, which each erasure changes."""
    return f"memshard:era:{cluster_id}"


def _key(memory_id: str) -> str:
    return f"loc:{memory_id}"
