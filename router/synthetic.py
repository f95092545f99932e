"""A memory of a reserved user that is stored, fetched, searched and deleted in one shard, as an agent's would be.

It passes the breakers as every call does, and after some rounds closes them again when nobody else dares: of a shard
that refuses writes because they failed, no other would ever find out that they work again. For that it passes
by the level's refusal of writes.
"""

import hashlib
from dataclasses import dataclass

from common.catalog import Cluster
from common.deadline import Deadline
from common.errors import Unavailable
from common.probe_user import probe_user
from common.topology import Shard, Topology
from memshard.ids import new_id
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.dispatch import set_route
from router.shards import DELETE, GET, SEARCH, STORE, Q, R, Rpc, Shards

_CONTENT = "a probe of the health monitor"
# What a probe that is cut off leaves behind goes by itself.
_TTL_S = 600


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Makes the round in one shard."""

    cluster: Cluster
    shards: Shards

    async def round(self, topology: Topology, shard: Shard, now_s: float, deadline: Deadline) -> None:
        """One round in the shard's first slot; `now_s` is the time since 1970.

        Raises what `Shards.call` raises, and Unavailable / WRONG_ANSWER.
        """
        slot = topology.ranges_of(shard.shard_id)[0][0]
        embedding = [1.0] + [0.0] * (self.cluster.dimensions - 1)
        memory = pb.Memory(
            id=new_id(),
            user_id=probe_user(shard.shard_id),
            type=pb.MEMORY_TYPE_WORKING,
            content=_CONTENT,
            embedding=embedding,
            embedding_model=self.cluster.embedding_model,
        )
        memory.expire_time.FromSeconds(int(now_s) + _TTL_S)
        digest = hashlib.sha256(memory.id.encode()).digest()

        async def ask(rpc: Rpc[Q, R], request: Q) -> R:
            set_route(request, topology, shard, [(slot, slot)])
            return await self.shards.probe(shard, rpc, request, deadline)

        await ask(STORE, shard_pb2.StoreRequest(memory=memory, digest=digest))
        got = await ask(GET, shard_pb2.GetRequest(id=memory.id, user_id=memory.user_id))
        if [found.memory.content for found in got.found] != [_CONTENT]:
            raise _wrong("what was stored was not found")
        wanted = shard_pb2.SearchRequest(user_id=memory.user_id, embedding=embedding, k=1)
        if not (await ask(SEARCH, wanted)).results:
            raise _wrong("what was stored was not found by a search")
        deletion = shard_pb2.DeleteRequest(id=memory.id, user_id=memory.user_id, request_id=memory.id)
        if not (await ask(DELETE, deletion)).deleted:
            raise _wrong("what was stored could not be deleted")


def _wrong(what: str) -> Unavailable:
    """Every call was answered, and one of them wrongly."""
    return Unavailable(what, reason="WRONG_ANSWER")
