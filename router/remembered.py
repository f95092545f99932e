"""All that a router remembers of its users' memories, as what has to be forgotten: one place for those who say so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from redis.asyncio import Redis

from router.location import LocationCache
from router.memories import MemoryCache


class Forgets(Protocol):
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

    async def drop_from_redis(self, redis: Redis, memory_ids: Sequence[str]) -> None:
        """Forgets what Redis has of them. Raises what its client raises."""
        ...


class Tells(Protocol):
    """What tells the other routers."""

    def tell_soon(self, memory_ids: Sequence[str]) -> None:
        """Has them forget these memories, soon."""
        ...


class Remembered:
    """The caches of a router together."""

    def __init__(self, locations: LocationCache, memories: MemoryCache, others: Tells) -> None:
        self.locations = locations
        self.memories = memories
        self._others = others

    @contextmanager
    def changing(self, memory_id: str) -> Iterator[None]:
        """`with` it: a memory is changed or deleted. Whatever becomes of that, what was known of it is forgotten."""
        try:
            yield
        finally:
            # Also when nobody knows how it ended: it may have been done.
            self.memories.drop([memory_id])
            self._others.tell_soon([memory_id])

    def drop(self, memory_ids: Sequence[str]) -> None:
        self.locations.drop(memory_ids)
        self.memories.drop(memory_ids)

    def clear(self) -> None:
        self.locations.clear()
        self.memories.clear()

    def hear_era(self, era: bytes) -> None:
        self.locations.hear_era(era)

    async def drop_from_redis(self, redis: Redis, memory_ids: Sequence[str]) -> None:
        await self.locations.drop_from_redis(redis, memory_ids)

    def flush(self) -> int:
        """Forgets everything, and goes on remembering; how much that was."""
        return self.locations.flush() + self.memories.flush()
