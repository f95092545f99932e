"""Which slot a memory is in, given its user and id: worked out, or asked of its claim."""

from common.deadline import Deadline
from memshard.internal.v1 import shard_pb2
from router.dispatch import Dispatch
from router.place import Placement, home_slot
from router.shards import FIND_CLAIM


async def slot_of_memory(
    placement: Placement, dispatch: Dispatch, user_id: str, memory_id: str, deadline: Deadline
) -> int | None:
    """The slot of a memory; None when there is none with this id, and never was."""
    slot = placement.memory_slot(user_id, memory_id)
    if slot is not None:
        return slot
    question = shard_pb2.FindClaimRequest(user_id=user_id, id=memory_id)
    _, answer = await dispatch.to_owner(home_slot(user_id, memory_id), FIND_CLAIM, question, deadline)
    return answer.memory_slot if answer.HasField("memory_slot") else None
