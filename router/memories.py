"""The cache of memories in the router: one memory of one user, as the bytes of an answer, with how fresh it is.

It is used only while this router hears what others have it forget (`router.listening`). That keeps what it has recent,
for reads that ask for nothing; what a read asks for is decided by the stamp of each entry alone, since a message can be
lost. What is erased is taken out before the erasure returns (`router.invalidation`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common import tracing
from common.config import RouterSettings
from common.topology import Topology
from memshard.v1 import memory_pb2 as pb
from router.bounded_cache import BoundedCache
from router.cache_layer import CacheLayer
from router.consistency import Consistency
from router.forgettings import Forgettings
from router.stamps import Stamp, Timelines

# Seconds before its expiry by this machine's clock from which on a memory is not answered from here: the database's
# clock, which decides, may be ahead by as much.
_EXPIRY_MARGIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A memory as it is remembered."""

    user_id: str
    slot: int
    encoded: bytes
    """A GetMemoryResponse without a report. With the bytes of a report behind it, it has one."""
    stamp: Stamp


class MemoryCache:
    """Memories that were read lately. An id has one place, whoever's it is: of two users with one id the later has it.

    `believes` says whether this router has heard all that others told it to forget.
    """

    def __init__(
        self, settings: RouterSettings, believes: Callable[[], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._believes = believes
        self._clock = clock
        self._ttl_s = settings.memory_cache_ttl_s
        self._cache: BoundedCache[tuple[str, bool], Kept] = BoundedCache(settings.memory_cache_bytes, clock)
        self._forgettings = Forgettings(clock)
        self._timelines = Timelines()
        self.layer = CacheLayer("memories")

    @property
    def is_on(self) -> bool:
        """Whether it remembers anything at the moment."""
        return bool(self._cache.max_bytes) and self._believes()

    @property
    def size(self) -> tuple[int, int, int]:
        """How many memories it has, how many bytes they take, and how many they may."""
        return len(self._cache), self._cache.size_bytes, self._cache.max_bytes

    def now(self) -> float:
        """On the clock of `Stamp.fresh_at`."""
        return self._clock()

    def find(
        self, user_id: str, memory_id: str, *, include_embedding: bool, consistency: Consistency, topology: Topology
    ) -> Kept | None:
        """This user's memory with this id, if what is remembered of it is fresh enough."""
        if consistency.strong or not self._cache.max_bytes:
            return None
        kept = self._cache.get((memory_id, include_embedding)) if self._believes() else None
        hit = (
            kept is not None
            and kept.user_id == user_id
            and self._timelines.holds(kept.stamp, kept.slot, topology)
            and kept.stamp.satisfies(consistency, topology.cutovers, self.now())
        )
        self.layer.looked("hit" if hit else "miss")
        tracing.current().set("memshard.cache.hit", hit)
        return kept if hit else None

    def remember(self, memory: pb.Memory, slot: int, stamp: Stamp, *, include_embedding: bool) -> None:
        """Keeps a memory as a server has just answered it.

        Not when it was to be forgotten after that server had everything, nor when what is kept is of a later state.
        """
        self._timelines.observe(stamp)
        if not self.is_on or self._forgettings.since(memory.id, stamp.fresh_at):
            return
        # Its embedding comes without a write that anybody would hear of.
        if memory.embedding_state == pb.EMBEDDING_STATE_PENDING:
            return
        key = (memory.id, include_embedding)
        known = self._cache.get(key)
        if (
            known is not None
            and (known.user_id, known.stamp.shard_id) == (memory.user_id, stamp.shard_id)
            and known.stamp.position > stamp.position
        ):
            return
        encoded = pb.GetMemoryResponse(memory=memory).SerializeToString()
        kept = Kept(memory.user_id, slot, encoded, stamp)
        self._cache.put(key, kept, size_bytes=len(encoded) + len(memory.user_id), ttl_s=self._for_s(memory))

    def drop(self, memory_ids: Sequence[str]) -> None:
        """Forgets memories with these ids, whoever's they are."""
        for memory_id in memory_ids:
            self._forgettings.forget(memory_id)
            self._cache.pop((memory_id, False))
            self._cache.pop((memory_id, True))

    def clear(self) -> None:
        """Forgets everything."""
        self._forgettings.forget_all()
        self._cache.clear()

    def flush(self) -> int:
        """The same; how much that was."""
        count = len(self._cache)
        self.clear()
        return count

    def _for_s(self, memory: pb.Memory) -> float:
        if not memory.HasField("expire_time"):
            return self._ttl_s
        left_s = memory.expire_time.ToMicroseconds() / 1e6 - time.time() - _EXPIRY_MARGIN_S
        return min(self._ttl_s, left_s)
