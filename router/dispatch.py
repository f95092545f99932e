"""A call to the owner of one slot: by the snapshot, and once more by a newer one when the shard says it is stale."""

from google.protobuf.message import Message

from common.deadline import Deadline
from common.errors import Unavailable, WrongShard
from common.topology import Shard, Topology
from memshard.internal.v1 import shard_pb2
from router.shards import RETRY_AFTER_S, Q, R, Rpc, Shards
from router.topology_watch import TopologyWatch


class Dispatch:
    """Sends requests about one slot to the shard that owns it."""

    def __init__(self, watch: TopologyWatch, shards: Shards) -> None:
        self._watch = watch
        self._shards = shards

    async def to_owner(self, slot: int, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> tuple[Shard, R]:
        """The owner of `slot` and its answer. Fills in the request's route.

        Raises what `Shards.call` raises; Unavailable / TOPOLOGY_CHANGING when the newer topology is stale as well.
        """
        try:
            return await self._once(slot, rpc, request, deadline)
        except WrongShard as stale:
            await self._watch.refresh(stale.epoch, deadline)
        try:
            return await self._once(slot, rpc, request, deadline)
        except WrongShard as stale:
            raise still_moving() from stale

    async def _once(self, slot: int, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> tuple[Shard, R]:
        topology = self._watch.topology
        shard = topology.owner(slot)
        set_route(request, topology, shard, [(slot, slot)])
        return shard, await self._shards.call(shard, rpc, request, deadline)


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
    return Unavailable(
        "the memory is between two shards at the moment", reason="TOPOLOGY_CHANGING", retry_after_s=RETRY_AFTER_S
    )
