"""Which slot a memory is in, given its user and id: worked out, or asked of its claim."""

from common.deadline import Deadline
from memshard.internal.v1 import shard_pb2
from router.consistency import STRONG, Consistency
from router.dispatch import Dispatch
from router.place import Placement, home_slot
from router.shards import FIND_CLAIM


async def slot_of_memory(
    placement: Placement,
    dispatch: Dispatch,
    user_id: str,
    memory_id: str,
    deadline: Deadline,
    consistency: Consistency = STRONG,
) -> int | None:
    """The slot of a memory; None when there is none with this id, and never was.

    A read that carries positions asks the primary: those of an update or a delete are of the shard that has the memory,
    and say nothing of the one that has the claim, which another caller may have made.
    """
    slot = placement.memory_slot(user_id, memory_id)
    if slot is not None:
        return slot
    question = shard_pb2.FindClaimRequest(user_id=user_id, id=memory_id)
    freshness = STRONG if consistency.positions else consistency
    found = await dispatch.read(home_slot(user_id, memory_id), FIND_CLAIM, question, freshness, deadline)
    return found.answer.memory_slot if found.answer.HasField("memory_slot") else None
