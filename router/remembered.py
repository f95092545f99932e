"""All that a router remembers of its users' memories, as what has to be forgotten: one place for those who say so."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from redis.asyncio import Redis

from memshard.internal.v1 import shard_pb2
from router.consistency import Position
from router.embeddings import EmbeddingCache
from router.envelope import HIGHEST, Envelopes
from router.location import LocationCache
from router.memories import MemoryCache
from router.memories_redis import MemoryRedis
from router.search_cache import SearchCache

# What is said to other routers besides ids that nothing is to be known of any more, which have no colon. A router that
# does not know it takes it for an id that nobody has.
_CHANGED = "memory:"
_WROTE = "user:"
_ERASED = "erased:"


class Hears(Protocol):
    """What forgets when it is told to, by this router or another."""

    def drop(self, said: Sequence[str], /) -> None:
        """Forgets all that this router itself remembers of memories with these ids, and what is on its way to it; and
        what else is said as `Remembered` says it."""
        ...

    def clear(self) -> None:
        """Forgets everything that this router itself remembers."""
        ...

    def hear_era(self, era: bytes) -> None:
        """What era it is in Redis."""
        ...


class Forgets(Protocol):
    """What forgets memories of one user everywhere."""

    def drop(self, said: Sequence[str], /) -> None:
        """As `Hears.drop`."""
        ...

    async def drop_from_redis(self, redis: Redis, said: Sequence[str], /) -> None:
        """Forgets what Redis has of them. Raises what its client raises."""
        ...


class Tells(Protocol):
    """What tells the other routers."""

    def tell_soon(self, said: Sequence[str], /) -> None:
        """Has them forget this, soon."""
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
        self,
        locations: LocationCache,
        memories: MemoryCache,
        memories_redis: MemoryRedis,
        searches: SearchCache,
        others: Tells,
        envelopes: Envelopes,
        embeddings: EmbeddingCache | None = None,
    ) -> None:
        self.locations = locations
        self.memories = memories
        self.memories_redis = memories_redis
        self.searches = searches
        self.embeddings = embeddings
        """Only where an embedder is asked over a network."""
        self._others = others
        self._envelopes = envelopes
        self._on_erased: list[Callable[[str], None]] = []

    def on_erased(self, forget: Callable[[str], None]) -> None:
        """Has `forget` hear of each user who is erased, here or elsewhere, as what stands for them (`user`)."""
        self._on_erased.append(forget)

    def user(self, user_id: str) -> str:
        """What stands for a user, here and when routers tell each other."""
        return self._envelopes.digest("user", user_id)

    def erased(self, user_id: str) -> str:
        """What tells routers that a user is erased."""
        return _ERASED + self.user(user_id)

    def erase(self, user_id: str) -> None:
        """What is known of a user is forgotten here, and soon by the others: also when they had no memories."""
        said = [self.erased(user_id)]
        self.drop(said)
        self._others.tell_soon(said)

    def wrote(self, user_ids: Iterable[str]) -> None:
        """Something of these users was written, or may have been: what their searches found is forgotten."""
        for user in map(self.user, user_ids):
            self.searches.user_wrote(user)
            self._others.tell_soon([_WROTE + user])

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
            # Where it is has not changed, and stays known.
            self._others.tell_soon([_CHANGED + memory_id])
            self.wrote([user_id])

    def of(self, user_id: str) -> Forgets:
        """The same, as far as they have memories of one user."""
        return _OfUser(self, user_id)

    def drop(self, said: Sequence[str]) -> None:
        if ids := _ids(said):
            # Which also keeps away what is on its way, of whatever id.
            self.locations.drop(ids)
            self.memories.drop(ids)
        for one in said:
            if one.startswith(_CHANGED):
                self.memories.drop([one.removeprefix(_CHANGED)])
            elif one.startswith(_WROTE):
                self.searches.user_wrote(one.removeprefix(_WROTE))
            elif one.startswith(_ERASED):
                user = one.removeprefix(_ERASED)
                self.searches.erase(user)
                for forget in self._on_erased:
                    forget(user)

    def clear(self) -> None:
        self.locations.clear()
        self.memories.clear()
        self.searches.clear()
        self._hear_era(b"")

    def hear_era(self, era: bytes) -> None:
        self.locations.hear_era(era)
        self._hear_era(era)

    def flush(self) -> int:
        """Forgets everything, and goes on remembering; how much that was."""
        of_texts = self.embeddings.flush() if self.embeddings is not None else 0
        return self.locations.flush() + self.memories.flush() + self.searches.flush() + of_texts

    def _hear_era(self, era: bytes) -> None:
        self.memories_redis.hear_era(era)
        if self.embeddings is not None:
            self.embeddings.hear_era(era)


@dataclass(frozen=True, slots=True)
class _OfUser:
    remembered: Remembered
    user_id: str

    def drop(self, said: Sequence[str]) -> None:
        self.remembered.drop(said)

    async def drop_from_redis(self, redis: Redis, said: Sequence[str]) -> None:
        ids = _ids(said)
        await self.remembered.locations.drop_from_redis(redis, ids)
        await self.remembered.memories_redis.drop(redis, self.user_id, ids)
        if self.remembered.embeddings is not None:
            await self.remembered.embeddings.drop(redis, self.user_id)


def _ids(said: Sequence[str]) -> list[str]:
    return [one for one in said if ":" not in one]
