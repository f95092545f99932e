"""All that a router remembers of its users' memories, as what has to be forgotten: one place for those who say so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from redis.asyncio import Redis

from memshard.internal.v1 import shard_pb2
from router.consistency import Position
from router.envelope import HIGHEST
from router.location import LocationCache
from router.memories import MemoryCache
from router.memories_redis import MemoryRedis


class Hears(Protocol):
    """What forgets when it is told to, by this router or another."""

    def drop(self, memory_ids: Sequence[str]) -> None:
        """Forgets all that this router itself remembers of these memories, and what is on its way to it."""
        ...

    def clear(self) -> None:
        """Forgets everything that this router itself remembers."""
        ...

    def hear_era(self, era: bytes) -> None:
        """What era it is in Redis."""
        ...


class Forgets(Protocol):
    """What forgets memories of one user everywhere."""

    def drop(self, memory_ids: Sequence[str]) -> None:
        """As `Hears.drop`."""
        ...

    async def drop_from_redis(self, redis: Redis, memory_ids: Sequence[str]) -> None:
        """Forgets what Redis has of them. Raises what its client raises."""
        ...


class Tells(Protocol):
    """What tells the other routers."""

    def tell_soon(self, memory_ids: Sequence[str]) -> None:
        """Has them forget these memories, soon."""
        ...


@dataclass(slots=True)
class Forgetting:
    """A change under way. Nobody knows where in the log it is, until it says so."""

    shard_id: str = ""
    position: Position = HIGHEST

    def done(self, shard_id: str, commit: shard_pb2.Commit) -> None:
        """It is there, and what is of a later place has it."""
        self.shard_id, self.position = shard_id, Position(commit.timeline, commit.lsn)


class Remembered:
    """The caches of a router together."""

    def __init__(
        self, locations: LocationCache, memories: MemoryCache, memories_redis: MemoryRedis, others: Tells
    ) -> None:
        self.locations = locations
        self.memories = memories
        self.memories_redis = memories_redis
        self._others = others

    @contextmanager
    def changing(self, user_id: str, memory_id: str) -> Iterator[Forgetting]:
        """`with` it: a memory is changed or deleted. Whatever becomes of that, what was known of it is forgotten."""
        forgetting = Forgetting()
        try:
            yield forgetting
        finally:
            # Also when nobody knows how it ended: it may have been done.
            self.memories.drop([memory_id])
            self.memories_redis.mark_soon(user_id, memory_id, forgetting.shard_id, forgetting.position)
            self._others.tell_soon([memory_id])

    def of(self, user_id: str) -> Forgets:
        """The same, as far as they have memories of one user."""
        return _OfUser(self, user_id)

    def drop(self, memory_ids: Sequence[str]) -> None:
        self.locations.drop(memory_ids)
        self.memories.drop(memory_ids)

    def clear(self) -> None:
        self.locations.clear()
        self.memories.clear()
        self.memories_redis.hear_era(b"")

    def hear_era(self, era: bytes) -> None:
        self.locations.hear_era(era)
        self.memories_redis.hear_era(era)

    def flush(self) -> int:
        """Forgets everything, and goes on remembering; how much that was."""
        return self.locations.flush() + self.memories.flush()


@dataclass(frozen=True, slots=True)
class _OfUser:
    remembered: Remembered
    user_id: str

    def drop(self, memory_ids: Sequence[str]) -> None:
        self.remembered.drop(memory_ids)

    async def drop_from_redis(self, redis: Redis, memory_ids: Sequence[str]) -> None:
        await self.remembered.locations.drop_from_redis(redis, memory_ids)
        await self.remembered.memories_redis.drop(redis, self.user_id, memory_ids)
