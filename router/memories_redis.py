"""The second layer of the cache of memories: Redis, which all routers of a cluster share.

An entry is as fresh as it says itself, as in a router's memory (`router.stamps`). Its age goes by Redis' clock alone:
it says for how long it was written, and Redis what is left of that. Whatever else is found under its name is nothing
(`router.envelope`), and whatever Redis does fails no call (`router.redis_cache`).

Between the moment at which an entry's age is worked out and that at which Redis writes it, it may lie in some buffer
while Redis stands still. So Redis is told what its own clock said when the entry was sent, and takes what has passed
since off the time for which it is written. What was under way for long is dropped: the marker of a change that was made
meanwhile may be gone.

Writing is put off, and shared by what comes meanwhile: nobody waits for it. What was changed has a *marker* in place of
its entry for a minute, so that what somebody read before the change is not written there after it. What was erased is
kept away by the era, as with locations (`router.location`).
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from google.protobuf.message import DecodeError
from redis.asyncio import Redis

from common import tracing
from common.cancellation import raise_if_cancelled
from common.config import RouterSettings
from common.deadline import Deadline
from common.gathering import Gathering
from memshard.internal.v1 import cache_pb2
from memshard.v1 import memory_pb2 as pb
from router.cache_layer import CacheLayer
from router.consistency import Position
from router.envelope import HIGHEST, MARKER, Envelopes, header
from router.memories import Kept, MemoryCache, Question, keeps_for_s
from router.redis_cache import NOW_MS, SILENCE, RedisCache
from router.stamps import Stamp

# Longer than any read is under way that began before the change.
_MARKER_MS = 60_000
# What waits for being written; more is dropped, and read from the shard once more.
_MOST_WAITING = 2_000
_MOST_WAITING_BYTES = 8 * 1024 * 1024
# In one script: a millisecond of Redis' one thread, and no more than it takes in at once.
_MOST_AT_ONCE = 50
_MOST_BYTES_AT_ONCE = 512 * 1024
# Names that are worked out without a pause: two milliseconds.
_MOST_DROPPED_AT_ONCE = 500
# Seconds that what waits is given to become more.
_GATHER_S = 0.002

# Milliseconds that an entry may be under way to Redis, by its clock, which may have been set meanwhile.
_MOST_LATE_MS = 1_000
# Seconds for which Redis' clock is known once it was read: both run alike for as long.
_CLOCK_KNOWN_S = 1.0

# KEYS 1 is the era, ARGV 1 what it was, and ARGV 2 the time when this was sent; of each other key, ARGV has what is to
# be there and for how many milliseconds. An entry of another era is dropped, as is one that comes late. What is there
# stays if it is of a later place in the same shard's log; a marker stays before entries of other shards, whose places
# say nothing of its own.
_WRITE = f"""{NOW_MS}
local late = now - ARGV[2]
local current = redis.call('GET', KEYS[1]) == ARGV[1] and math.abs(late) <= {_MOST_LATE_MS}
for number = 2, #KEYS do
    local new, ttl = ARGV[2 * number - 1], tonumber(ARGV[2 * number])
    local marks = string.sub(new, 1, 1) == 'X'
    local old = redis.pcall('GET', KEYS[number])
    local stays = false
    if type(old) == 'string' then
        local there, here = string.match(old, '^[^\\n]*'), string.match(new, '^[^\\n]*')
        if string.sub(there, 27) == string.sub(here, 27) then
            stays = string.sub(there, 3, 26) > string.sub(here, 3, 26)
        else
            stays = string.sub(there, 1, 1) == 'X' and not marks
        end
    end
    if not marks then ttl = ttl - math.max(0, late) end
    if (marks or current) and not stays and ttl > 0 then redis.call('SET', KEYS[number], new, 'PX', ttl) end
end
return now
"""


@dataclass(frozen=True, slots=True)
class _Marker:
    shard_id: str
    position: Position


@dataclass(frozen=True, slots=True)
class _Entry:
    question: Question
    kept: Kept
    memory: pb.Memory
    era: bytes


@dataclass(frozen=True, slots=True)
class _Reply:
    """What was under a name: the bytes, and for how many milliseconds more."""

    value: object
    left_ms: object


class _RedisClock:
    """What time it is by Redis' clock: that or a little earlier, and never later.

    It said what it was before that was heard here, and since then as much time has passed there as here.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._said_ms = 0
        self._heard_at = -math.inf

    def hear(self, said_ms: int) -> None:
        """It has just said what it is."""
        self._said_ms, self._heard_at = said_ms, self._now()

    @property
    def now_ms(self) -> int | None:
        """None when it was not heard lately."""
        since_s = self._now() - self._heard_at
        return self._said_ms + int(since_s * 1000) if since_s < _CLOCK_KNOWN_S else None


class MemoryRedis:
    """Memories in Redis. No method raises for what Redis does, but `drop`."""

    def __init__(
        self, settings: RouterSettings, redis: RedisCache, envelopes: Envelopes, cluster_id: str, first: MemoryCache
    ) -> None:
        """`first` is the layer before this one, which hears what is to be forgotten."""
        self.layer = CacheLayer("memories_redis")
        self._redis = redis
        self._envelopes = envelopes
        self._cluster_id = cluster_id
        self._era_key = f"memshard:era:{cluster_id}"
        self._ttl_s = settings.memory_redis_ttl_s
        self._first = first
        self._clock = _RedisClock(first.now)
        self._era = b""
        self._looks = Gathering("look into Redis together", self._look_alone, self._look_together)
        self._write = redis.redis.register_script(_WRITE) if redis.redis is not None else None
        self._waiting: OrderedDict[str, _Entry | _Marker] = OrderedDict()
        self._waiting_bytes = 0
        self._anything = asyncio.Event()

    @property
    def is_on(self) -> bool:
        """Whether it is asked at the moment."""
        return self._write is not None and self._ttl_s > 0 and self._first.is_on

    @property
    def era(self) -> bytes:
        """To be taken before a memory is read that is to be kept."""
        return self._era

    def hear_era(self, era: bytes) -> None:
        """What era it is in Redis."""
        self._era = era

    async def find(self, question: Question, will_do: Callable[[Kept], bool]) -> tuple[Kept, pb.Memory] | None:
        """What Redis has, if it will do, as fresh as it is: what will not is no hit."""
        name = self._name(question)
        asked_at = self._first.now()
        with tracing.span("look into Redis", {"memshard.cache.layer": self.layer.name}) as span:
            reply = await self._looks.serve(name, Deadline.after(self._redis.timeout_s * 2))
            found = self._opened(question, name, reply, asked_at)
            if found is not None and not will_do(found[0]):
                found = None
            span.set("memshard.cache.hit", found is not None)
        self.layer.looked("hit" if found else "unavailable" if reply.value is SILENCE else "miss")
        return found

    def keep_soon(self, question: Question, kept: Kept, memory: pb.Memory, era: bytes) -> None:
        """Has a memory written, as a server has just answered it, unless there is an erasure after `era`."""
        name = self._name(question)
        if not self.is_on or isinstance(self._waiting.get(name), _Marker):
            return
        self._wait(name, _Entry(question, kept, memory, era))

    def mark_soon(self, user_id: str, memory_id: str, shard_id: str, position: Position = HIGHEST) -> None:
        """Has everything forgotten that is of before a change, which is at a place in its shard's log, or nobody knows
        where."""
        if self._write is None or not self._ttl_s:
            return
        for include_embedding in (False, True):
            name = self._name(Question(user_id, memory_id, include_embedding))
            self._wait(name, _Marker(shard_id, position))

    async def drop(self, redis: Redis, user_id: str, memory_ids: Sequence[str]) -> None:
        """Drops a user's memories from Redis. Raises what its client raises."""
        for start in range(0, len(memory_ids), _MOST_DROPPED_AT_ONCE):
            some = memory_ids[start : start + _MOST_DROPPED_AT_ONCE]
            await redis.delete(
                *(self._name(Question(user_id, memory_id, b)) for memory_id in some for b in (False, True))
            )

    async def run(self) -> None:
        """Writes what waits, until cancelled."""
        while True:
            await self._anything.wait()
            self._anything.clear()
            await asyncio.sleep(_GATHER_S)
            while self._waiting:
                await self._write_some()
                raise_if_cancelled()

    def _wait(self, name: str, what: "_Entry | _Marker") -> None:
        self._take(name)
        self._waiting[name] = what
        self._waiting_bytes += _size_of(what)
        while len(self._waiting) > _MOST_WAITING or self._waiting_bytes > _MOST_WAITING_BYTES:
            self._take(next(iter(self._waiting)))
        self._anything.set()

    def _take(self, name: str) -> None:
        """What waits under a name does not wait any more."""
        what = self._waiting.pop(name, None)
        if what is not None:
            self._waiting_bytes -= _size_of(what)

    async def _write_some(self) -> None:
        # Before the ages of entries are worked out.
        sent_ms = await self._redis_now_ms()
        keys, arguments, size_bytes = [self._era_key], [], 0
        era: bytes | None = None
        for name in list(islice(self._waiting, _MOST_AT_ONCE)):
            waiting = self._waiting[name]
            if isinstance(waiting, _Entry):
                if era is not None and waiting.era != era:
                    continue
                era = waiting.era
            self._take(name)
            new, ttl_ms = self._made(name, waiting)
            if ttl_ms > 0:
                keys.append(name)
                arguments += [new, ttl_ms]
                size_bytes += len(new)
            if size_bytes > _MOST_BYTES_AT_ONCE:
                break
        write = self._write
        if write is not None and arguments:
            script: Callable[..., Awaitable[object]] = write
            reply = await self._redis.ask(lambda _: script(keys=keys, args=[era or b"", sent_ms, *arguments]))
            if isinstance(reply, int):
                self._clock.hear(reply)

    async def _redis_now_ms(self) -> int:
        """What Redis' clock says, or said a moment ago; 0 when it does not answer: then entries are dropped."""

        async def look(redis: Redis) -> object:
            seconds, microseconds = await redis.time()
            return seconds * 1000 + microseconds // 1000

        if self._clock.now_ms is None:
            said = await self._redis.ask(look)
            if isinstance(said, int):
                self._clock.hear(said)
        return self._clock.now_ms or 0

    def _made(self, name: str, waiting: "_Entry | _Marker") -> tuple[bytes, int]:
        """What is to be under a name, and for how many milliseconds; 0: nothing."""
        if isinstance(waiting, _Marker):
            return header(MARKER, waiting.shard_id, waiting.position), _MARKER_MS
        question, kept, memory = waiting.question, waiting.kept, waiting.memory
        ttl_ms = int(keeps_for_s(memory, self._ttl_s) * 1000)
        age_ms = max(0, round((self._first.now() - kept.stamp.fresh_at) * 1000))
        if ttl_ms <= 0 or not self._first.may_keep(question.memory_id, kept.stamp):
            return b"", 0
        cached = cache_pb2.CachedMemory(
            cluster_id=self._cluster_id,
            user_id=question.user_id,
            id=question.memory_id,
            include_embedding=question.include_embedding,
            slot=kept.slot,
            age_ms=age_ms,
            ttl_ms=ttl_ms,
            answer=kept.encoded,
        )
        stamp = kept.stamp
        return self._envelopes.seal(name, stamp.shard_id, stamp.position, cached.SerializeToString()), ttl_ms

    def _opened(self, question: Question, name: str, reply: _Reply, asked_at: float) -> tuple[Kept, pb.Memory] | None:
        opened = self._envelopes.open(name, reply.value)
        if opened is None:
            return None
        try:
            cached = cache_pb2.CachedMemory.FromString(opened.payload)
            memory = pb.GetMemoryResponse.FromString(cached.answer).memory
        except DecodeError:
            return None
        said = Question(cached.user_id, cached.id, cached.include_embedding)
        if cached.cluster_id != self._cluster_id or said != question or (memory.user_id, memory.id) != question[:2]:
            return None
        left_ms = reply.left_ms
        if not isinstance(left_ms, int) or not 0 < left_ms <= cached.ttl_ms or keeps_for_s(memory, 1.0) <= 0:
            return None
        age_s = (cached.age_ms + cached.ttl_ms - left_ms) / 1000
        stamp = Stamp(opened.shard_id, opened.position, asked_at - age_s)
        return Kept(question.user_id, cached.slot, cached.answer, stamp), memory

    async def _look_alone(self, name: str, deadline: Deadline) -> _Reply:
        (reply,) = await self._look_together([name], deadline)
        return reply

    async def _look_together(self, names: Sequence[str], _: Deadline) -> list[_Reply]:
        async def look(redis: Redis) -> object:
            async with redis.pipeline(transaction=False) as pipeline:
                for name in names:
                    # In this order: what is written in between is taken for older than it is, and not the other way.
                    pipeline.pttl(name)
                    pipeline.get(name)
                return await pipeline.execute(raise_on_error=False)

        replies: Any = await self._redis.ask(look)
        if not isinstance(replies, list) or len(replies) != 2 * len(names):
            return [_Reply(SILENCE, 0)] * len(names)
        return [_Reply(replies[2 * n + 1], replies[2 * n]) for n in range(len(names))]

    def _name(self, question: Question) -> str:
        user_id, memory_id, include_embedding = question
        return f"mem:{self._envelopes.digest(self._cluster_id, user_id, memory_id)}:{int(include_embedding)}"


def _size_of(waiting: "_Entry | _Marker") -> int:
    # The message that was read, and its bytes.
    return 2 * len(waiting.kept.encoded) if isinstance(waiting, _Entry) else 0
