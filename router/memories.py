"""The cache of memories in the router: one memory of one user, as the bytes of an answer, with how fresh it is.

It is used only while this router hears what others have it forget (`router.listening`). That keeps what it has recent,
for reads that ask for nothing; what a read asks for is decided by the stamp of each entry alone, since a message can be
lost. What is erased is taken out before the erasure returns (`router.invalidation`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Question(NamedTuple):
    """Which memory is wanted, and how much of it."""

    user_id: str
    memory_id: str
    include_embedding: bool


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

    `believes` says whether this router has heard all that others told it to forget; `timelines` are those of all that
    hears of any.
    """

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
        self._cache: BoundedCache[tuple[str, bool], Kept] = BoundedCache(settings.memory_cache_bytes, clock)
        self._forgettings = Forgettings(clock)
        self._timelines = timelines or Timelines()
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

    def find(self, question: Question, consistency: Consistency, topology: Topology) -> Kept | None:
        """The memory that is asked for, if what is remembered of it is fresh enough."""
        if consistency.strong or not self.is_on:
            return None
        kept = self._cache.get((question.memory_id, question.include_embedding))
        hit = kept is not None and self._answers(kept, question, consistency, topology)
        self.layer.looked("hit" if hit else "miss")
        tracing.current().set("memshard.cache.hit", hit)
        return kept if hit else None

    def forgotten_at(self, memory_id: str) -> float:
        """When this router was last made to forget a memory, or another that shares its group."""
        return self._forgettings.last(memory_id)

    def may_answer(self, kept: Kept, question: Question, consistency: Consistency, topology: Topology) -> bool:
        """Whether what another layer has is fresh enough, and not of before something that made this router forget."""
        self._timelines.observe(kept.stamp.shard_id, kept.stamp.position.timeline)
        return self.may_keep(question.memory_id, kept.stamp) and self._answers(kept, question, consistency, topology)

    def may_keep(self, memory_id: str, stamp: Stamp) -> bool:
        """Whether what has this stamp is not of before something that made this router forget it."""
        return self.is_on and not self._forgettings.since(memory_id, stamp.fresh_at)

    def remember(self, question: Question, kept: Kept, memory: pb.Memory) -> None:
        """Keeps a memory as it was just answered.

        Not when it was to be forgotten after its server had everything, nor when what is remembered is of a later one.
        """
        self._timelines.observe(kept.stamp.shard_id, kept.stamp.position.timeline)
        if not self.may_keep(question.memory_id, kept.stamp):
            return
        key = (question.memory_id, question.include_embedding)
        known = self._cache.get(key)
        if (
            known is not None
            and (known.user_id, known.stamp.shard_id) == (kept.user_id, kept.stamp.shard_id)
            and known.stamp.position > kept.stamp.position
        ):
            return
        size_bytes = len(kept.encoded) + len(kept.user_id)
        self._cache.put(key, kept, size_bytes=size_bytes, ttl_s=keeps_for_s(memory, self._ttl_s))

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

    def _answers(self, kept: Kept, question: Question, consistency: Consistency, topology: Topology) -> bool:
        return (
            kept.user_id == question.user_id
            and self._timelines.holds(kept.stamp, kept.slot, topology)
            and kept.stamp.satisfies(consistency, topology.cutovers, self.now())
        )


def keeps_for_s(memory: pb.Memory, most_s: float) -> float:
    """Seconds that a memory may be remembered, `most_s` at most; 0 or less: not at all."""
    if memory.embedding_state == pb.EMBEDDING_STATE_PENDING:
        # Its embedding comes without a write that anybody would hear of.
        return 0.0
    if not memory.HasField("expire_time"):
        return most_s
    return min(most_s, memory.expire_time.ToMicroseconds() / 1e6 - time.time() - _EXPIRY_MARGIN_S)
