"""The cache of search results in the router: one search of one user, with how fresh its answer is.

What a search finds depends on all of the user's memories, so every write of that user's that this router hears of
makes it forget all of them: results of before it are not used any more, and pushed out as others come. What a read asks
for is decided by the stamp alone, as with memories (`router.memories`), since what is heard can be lost.

Only searches of a user on one shard are remembered. What is incomplete, or stood in for what was asked, is not.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from common import tracing
from common.config import RouterSettings
from common.topology import Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.bounded_cache import BoundedCache
from router.cache_layer import CacheLayer
from router.consistency import Consistency
from router.forgettings import Forgettings
from router.memories import keeps_for_s
from router.stamps import Stamp, Timelines


class SearchKey(NamedTuple):
    """Whose search, and what is looked for."""

    user: str
    """What stands for the user (`Envelopes.digest`)."""
    digest: bytes

    @classmethod
    def of(cls, user: str, question: shard_pb2.SearchRequest, offset: int) -> "SearchKey":
        """What a shard is asked, the user among it, before it is said which, and from where on its answer is wanted."""
        asked = question.SerializeToString(deterministic=True)
        digest = hashlib.blake2b(asked, digest_size=20, salt=offset.to_bytes(4, "big"))
        return cls(user, digest.digest())


@dataclass(frozen=True, slots=True)
class KeptResults:
    """Results as they are remembered."""

    slot: int
    encoded: bytes
    """A SearchMemoriesResponse without a report."""
    stamp: Stamp


class SearchCache:
    """Results of searches that were made lately. `believes` and `timelines` as in `MemoryCache`."""

    def __init__(
        self,
        settings: RouterSettings,
        believes: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        timelines: Timelines | None = None,
    ) -> None:
        self._believes = believes
        self._clock = clock
        self._ttl_s = settings.memory_cache_ttl_s
        self._cache: BoundedCache[SearchKey, KeptResults] = BoundedCache(settings.search_cache_bytes, clock)
        self._forgettings = Forgettings(clock)
        self._timelines = timelines or Timelines()
        self.layer = CacheLayer("searches")

    @property
    def is_on(self) -> bool:
        """Whether it remembers anything at the moment."""
        return bool(self._cache.max_bytes) and self._believes()

    @property
    def size(self) -> tuple[int, int]:
        """How many searches it has, and how many bytes they take."""
        return len(self._cache), self._cache.size_bytes

    def now(self) -> float:
        """On the clock of `Stamp.fresh_at`."""
        return self._clock()

    def find(self, key: SearchKey, consistency: Consistency, topology: Topology) -> KeptResults | None:
        """The results of this search, if what is remembered is fresh enough."""
        if consistency.strong or not self.is_on:
            return None
        kept = self._cache.get(key)
        hit = (
            kept is not None
            and not self._forgettings.since(key.user, kept.stamp.fresh_at)
            and self._timelines.holds(kept.stamp, kept.slot, topology)
            and kept.stamp.satisfies(consistency, topology.cutovers, self.now())
        )
        self.layer.looked("hit" if hit else "miss")
        tracing.current().set("memshard.cache.hit", hit)
        return kept if hit else None

    def forgotten_at(self, user: str) -> float:
        """When this router was last made to forget this user's searches, or those of another of the same group."""
        return self._forgettings.last(user)

    def remember(self, key: SearchKey, kept: KeptResults, response: pb.SearchMemoriesResponse) -> None:
        """Keeps the results of a search as a server has just answered it; not if the user wrote meanwhile."""
        self._timelines.observe(kept.stamp.shard_id, kept.stamp.position.timeline)
        if not self.is_on or self._forgettings.since(key.user, kept.stamp.fresh_at):
            return
        known = self._cache.get(key)
        if (
            known is not None
            and known.stamp.shard_id == kept.stamp.shard_id
            and known.stamp.position > kept.stamp.position
        ):
            return
        ttl_s = min((keeps_for_s(result.memory, self._ttl_s) for result in response.results), default=self._ttl_s)
        self._cache.put(key, kept, size_bytes=len(kept.encoded) + len(key.user), ttl_s=ttl_s)

    def user_wrote(self, user: str) -> None:
        """Forgets what this user's searches found; `user` as in the key."""
        self._forgettings.forget(user)

    def erase(self, user: str) -> None:
        """The same, and takes it out of memory at once."""
        self.user_wrote(user)
        self._cache.pop_where(lambda key, _: key.user == user)

    def clear(self) -> None:
        """Forgets everything."""
        self._forgettings.forget_all()
        self._cache.clear()

    def flush(self) -> int:
        """The same; how much that was."""
        count = len(self._cache)
        self.clear()
        return count
