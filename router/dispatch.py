"""A call to the owner of one slot: by the snapshot, and again by a newer one when the shard says that it is stale.

What fails is tried again as a whole: after a failover, the owner has another address.
"""

from dataclasses import dataclass
from typing import Generic

from google.protobuf.message import Message

from common.deadline import Deadline
from common.errors import Unavailable, WrongShard
from common.topology import Shard, Topology
from memshard.internal.v1 import shard_pb2
from router.consistency import STRONG, Consistency
from router.following import Following
from router.reads import Reads, Role
from router.report import Origin
from router.retries import Retries
from router.shards import Q, R, Rpc
from router.topology_watch import TopologyWatch


@dataclass(frozen=True, slots=True)
class Answered(Generic[R]):
    """An answer, which shard gave it, and which kind of its servers."""

    shard: Shard
    answer: R
    served_by: Role

    @property
    def origin(self) -> Origin:
        """For its report."""
        return Origin.of_shards((self.shard.shard_id,), (self.served_by,))


class Dispatch:
    """Sends requests about one slot to the shard that owns it."""

    def __init__(self, watch: TopologyWatch, reads: Reads, retries: Retries) -> None:
        self._watch = watch
        self._reads = reads
        self._retries = retries

    def admit(self, slot: int, rpc: Rpc[Q, R]) -> None:
        """Whether the owner of a slot may be asked this now, for what is answered without asking it.

        Raises Unavailable / SHARD_MAINTENANCE.
        """
        shard = self.owner(slot)
        self._tell_level(shard)
        self._reads.shards.admit(shard, rpc)

    def owner(self, slot: int) -> Shard:
        """The owner of a slot by the snapshot."""
        return self._watch.topology.owner(slot)

    async def to_owner(self, slot: int, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> tuple[Shard, R]:
        """The owner of `slot`, and the answer of its primary. Fills in the request's route.

        Raises what `Shards.call` raises; Unavailable / TOPOLOGY_CHANGING when the newer topology is stale as well.
        """
        answered = await self.read(slot, rpc, request, STRONG, deadline)
        return answered.shard, answered.answer

    async def read(
        self, slot: int, rpc: Rpc[Q, R], request: Q, consistency: Consistency, deadline: Deadline
    ) -> Answered[R]:
        """The answer of a server of the owner of `slot` that is fresh enough. Fills in the request's route.

        Raises what `Reads.ask` raises; Unavailable / TOPOLOGY_CHANGING when the newer topology is stale as well.
        """

        async def attempt() -> Answered[R]:
            following = Following(self._watch, deadline, self._retries.budget)
            while True:
                try:
                    return await self._once(slot, rpc, request, consistency, deadline)
                except WrongShard as stale:
                    if not await following.again([stale]):
                        raise still_moving() from stale

        return await self._retries.run(attempt, deadline)

    async def _once(
        self, slot: int, rpc: Rpc[Q, R], request: Q, consistency: Consistency, deadline: Deadline
    ) -> Answered[R]:
        topology = self._watch.topology
        shard = topology.owner(slot)
        self._tell_level(shard)
        set_route(request, topology, shard, [(slot, slot)])
        wanted = consistency.under(topology.cutovers)
        answer, served_by = await self._reads.ask(shard, rpc, request, wanted, deadline)
        return Answered(shard, answer, served_by)

    def _tell_level(self, shard: Shard) -> None:
        self._reads.shards.levels.tell_trace((shard.shard_id,))


def set_route(request: Message, topology: Topology, shard: Shard, ranges: list[tuple[int, int]]) -> None:
    """Writes into a request where it is going, as the router believes."""
    route = shard_pb2.Route(
        cluster_id=topology.cluster_id,
        shard_id=shard.shard_id,
        epoch=topology.epoch,
        ranges=[shard_pb2.SlotRange(first=first, last=last) for first, last in ranges],
    )
    request.route.CopyFrom(route)  # type: ignore[attr-defined]  # Every request of ShardService has one.


def still_moving() -> Unavailable:
    """Router and shards disagree on who owns what, even after a fresh look."""
    return Unavailable("the memory is between two shards at the moment", reason="TOPOLOGY_CHANGING")
