"""What a router notes of the requests that pass: how many, how large, whose.

Whose is for the list of hot users and, hashed, for traces. A metric never has a user in it: there are too many.
"""

import hashlib
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from google.protobuf.message import Message

from common import tracing
from common.telemetry.heavy_hitters import HeavyHitters, Hitter
from common.telemetry.registry import BATCH_SIZE, CONTEXT_SIZE, RELEVANCE
from common.window import SlidingCount
from memshard.v1 import memory_pb2 as pb
from router.levels import Levels

# Enough that whoever makes half a percent of the calls is among them.
_MOST_HITTERS = 200
HALF_LIFE_S = 300.0

_REQUESTS_S = 10
_QUERIES_S = 60
_QUERIES_SLICE_S = 5

_READS = frozenset({"GetMemory", "ListMemories", "SearchMemories", "ListMemoryVersions"})
# Longer ones are refused. An agent may name itself as it likes.
_MOST_NAME_BYTES = 256

HotUser = tuple[str, str]
"""A user, and the operation."""


class Observed:
    """Sees all calls of MemoryService (`common.rpc.Watches`)."""

    def __init__(self, token_key: bytes, levels: Levels, clock: Callable[[], float] = time.monotonic) -> None:
        self._hash_key = hashlib.blake2b(token_key, digest_size=32, person=b"memshard-users").digest()
        self._levels = levels
        self._hot: HeavyHitters[HotUser] = HeavyHitters(_MOST_HITTERS, HALF_LIFE_S, clock)
        self._requests = SlidingCount(1.0, _REQUESTS_S, clock)
        self._queries = SlidingCount(_QUERIES_SLICE_S, _QUERIES_S // _QUERIES_SLICE_S, clock)
        self._context_size = {rpc: CONTEXT_SIZE.labels(rpc) for rpc in _READS}
        self._relevance = {
            number: RELEVANCE.labels(name.removeprefix("SCORE_KIND_").lower()) for name, number in pb.ScoreKind.items()
        }

    def asked(self, rpc: str, request: Message) -> None:
        self._requests.add()
        if rpc in _READS:
            self._queries.add()
        users, agents = _NAMED.get(rpc, _of_user)(request)
        for user in users:
            self._hot.add((rpc, user))
        span = tracing.current()
        if not span.is_recorded:
            return
        span.set("memshard.operation", rpc)
        self._levels.tell_trace()
        if len(users) == 1:
            (user,) = users
            span.set("enduser.pseudo.id", partial(self.hashed, user))
        if len(agents) == 1:
            (agent,) = agents
            span.set("gen_ai.agent.id", agent)

    def answered(self, rpc: str, request: Message, response: Message | bytes, size_bytes: int) -> None:
        if rpc in _READS:
            self._context_size[rpc].observe(size_bytes)
        if isinstance(response, pb.SearchMemoriesResponse):
            # By recency, nothing has a score.
            results, kind = response.results, response.score_kind
            if results and kind != pb.SCORE_KIND_RECENCY:
                # What is unlike has a cosine below 0. A histogram's sum may not fall, and a page on which it is below 0
                # is no OpenMetrics.
                self._relevance[kind].observe(max(0.0, results[0].score))
        elif isinstance(request, pb.BatchStoreMemoriesRequest):
            BATCH_SIZE.observe(len(request.memories))

    def forget(self, is_erased: Callable[[str], bool]) -> None:
        """Takes users off the list of hot ones: who is erased is nowhere, and so not there either."""
        self._hot.forget(lambda hot: is_erased(hot[1]))

    def hot_users(self, most: int) -> tuple[list[Hitter[HotUser]], float]:
        """Who is asked about most, and how many calls there were in all, weighted by age."""
        return self._hot.top(most), self._hot.total

    def hashed(self, user_id: str) -> str:
        """What stands for a user where its id must not: the same everywhere in this cluster, and in no other."""
        return hashlib.blake2b(user_id.encode(), digest_size=8, key=self._hash_key).hexdigest()

    @property
    def requests_per_s(self) -> float:
        """Calls that came, over the last ten seconds."""
        return self._requests.total() / _REQUESTS_S

    @property
    def queries_per_s(self) -> float:
        """Reads that came, over the last minute."""
        return self._queries.total() / _QUERIES_S


Named = tuple[Collection[str], Collection[str]]
"""The users that a request names, and the agents whose memories it writes, each of them once."""


def _of_user(request: Any) -> Named:
    return _short(request.user_id), ()


def _of_memory(request: Any) -> Named:
    return _short(request.memory.user_id), _short(request.memory.agent_id)


def _of_memories(request: Any) -> Named:
    users = {memory.user_id for memory in request.memories}
    agents = {memory.agent_id for memory in request.memories}
    # One of whom nothing may be said is one more agent all the same.
    return {user for user in users if _is_short(user)}, agents if all(map(_is_short, agents)) else ()


_NAMED = {"BatchStoreMemories": _of_memories, "StoreMemory": _of_memory, "UpdateMemory": _of_memory}


def _short(name: str) -> tuple[str, ...]:
    return (name,) if _is_short(name) else ()


def _is_short(name: str) -> bool:
    return 0 < len(name) <= _MOST_NAME_BYTES
