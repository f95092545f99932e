"""Finding a memory by id alone: where it was last known, else everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.deadline import Deadline
from common.errors import Ambiguous, DeadlineExceeded, NotFound, Unavailable
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import STRONG, Consistency
from router.dispatch import Dispatch
from router.fanout import Fanout
from router.location import LocationCache
from router.reads import Role
from router.report import Origin
from router.shards import GET


@dataclass(frozen=True, slots=True)
class Located:
    """A memory, and which shards were asked for it."""

    memory: pb.Memory
    origin: Origin


class Locator:
    """Fetches memories whose user is not known."""

    def __init__(self, locations: LocationCache, dispatch: Dispatch, fanout: Fanout) -> None:
        self._locations = locations
        self._dispatch = dispatch
        self._fanout = fanout

    async def get(
        self, memory_id: str, deadline: Deadline, *, include_embedding: bool, consistency: Consistency = STRONG
    ) -> Located:
        """The one memory with this id, whoever's it is.

        Raises Ambiguous when several users have it, NotFound when all shards say that nobody has, and Unavailable
        when nobody who answered has it but not all answered.
        """
        request = shard_pb2.GetRequest(id=memory_id, include_embedding=include_embedding)
        located = await self._where_known(request, consistency, deadline)
        return located or await self._everywhere(request, consistency, deadline)

    async def _where_known(
        self, request: shard_pb2.GetRequest, consistency: Consistency, deadline: Deadline
    ) -> Located | None:
        """The memory, if the location cache leads to it: one call for each slot known, which is nearly always one."""
        slots = await self._locations.find(request.id)
        asked: set[str] = set()
        found: list[shard_pb2.FoundMemory] = []
        roles: set[Role] = set()
        for slot in sorted(slots):
            # Half of what is left, since a stale entry may lead to a shard that does not answer.
            half = Deadline.after(deadline.remaining_s() / 2)
            try:
                answered = await self._dispatch.read(slot, GET, request, consistency, half)
            except (Unavailable, DeadlineExceeded):
                # Somebody else may have it; and if nobody has, asking everybody says who could not be asked.
                return None
            asked.add(answered.shard.shard_id)
            roles.add(answered.served_by)
            found.extend(answered.answer.found)
        if not found:
            return None
        return Located(_only(found, request.id), Origin.of_shards(asked, roles))

    async def _everywhere(self, request: shard_pb2.GetRequest, consistency: Consistency, deadline: Deadline) -> Located:
        began = self._locations.moment()
        gathered = await self._fanout.ask_all(GET, request, deadline, consistency)
        found = [found for _, answer in gathered.answers for found in answer.found]
        if not found:
            gathered.require_all()
            if consistency.strong:
                await self._locations.forget(request.id)
            raise NotFound(f"there is no memory {request.id}")
        if not gathered.failed and gathered.served_by == {"primary"}:
            # What replicas know may be older than what the cache has been told by a store meanwhile.
            await self._locations.learn(request.id, frozenset(item.slot for item in found), since=began)
        return Located(_only(found, request.id), gathered.origin)


def _only(found: Sequence[shard_pb2.FoundMemory], memory_id: str) -> pb.Memory:
    """The memory that was found, once for each user. Raises Ambiguous when several users have one."""
    by_user = {item.memory.user_id: item.memory for item in found}
    if len(by_user) > 1:
        raise Ambiguous(f"several users have a memory {memory_id}; say whose is meant with user_id")
    return next(iter(by_user.values()))
