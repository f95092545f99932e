"""Changing, deleting, erasing: each has one effect for one request id, which is made here when the caller gave none."""

import hashlib
import uuid

from common.deadline import Deadline
from common.errors import Unavailable
from common.slots import slot_of
from common.topology import Shard
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router import validate
from router.digest import digest_of
from router.parts import Parts
from router.place import home_slot
from router.resolve import slot_of_memory
from router.shards import DELETE, ERASE, UPDATE

# Ids that the caches forget, and the shards hear of, at once: 2 MB.
_MOST_FORGOTTEN = 50_000


async def update(parts: Parts, request: pb.UpdateMemoryRequest, deadline: Deadline) -> pb.UpdateMemoryResponse:
    """Validates, embeds new content, finds the memory's slot, and has its owner change it."""
    change = validate.change(request, parts.cluster)
    memory, fields = change.memory, list(change.update_mask.paths)
    digest = _digest_of_change(change)
    if "content" in fields and "embedding" not in fields:
        # The old embedding is of the old content. LATER is an empty one, which the shard makes up for.
        memory.embedding.extend(await parts.embedding.of_memory(memory, deadline))
        memory.embedding_model = parts.cluster.embedding_model
        fields.append("embedding")
    question = shard_pb2.UpdateRequest(
        memory=memory,
        fields=fields,
        expected_version=change.expected_version if change.HasField("expected_version") else None,
        request_id=change.request_id or str(uuid.uuid4()),
        digest=digest,
    )
    slot = await _slot_to_change(parts, memory.user_id, memory.id, deadline)
    async with parts.request_ids.taken(memory.user_id, change.request_id, digest, slot, deadline) as (where, taken):
        with parts.remembered.changing(memory.user_id, memory.id) as forgetting:
            shard, answer = await parts.dispatch.to_owner(where, UPDATE, question, deadline)
            forgetting.done(shard.shard_id, answer.commit)
    receipt = parts.tokens.receipt(*taken, (shard.shard_id, answer.commit))
    return pb.UpdateMemoryResponse(memory=answer.memory, receipt=receipt)


async def delete(parts: Parts, request: pb.DeleteMemoryRequest, deadline: Deadline) -> pb.DeleteMemoryResponse:
    """Finds the memory's slot and has its owner delete it."""
    memory_id = validate.memory_id(request.id, "id")
    user_id = validate.user_id(request.user_id, "user_id")
    request_id = validate.request_id(request.request_id)
    question = shard_pb2.DeleteRequest(id=memory_id, user_id=user_id, request_id=request_id or str(uuid.uuid4()))
    digest = hashlib.sha256(f"memshard delete 1\0{memory_id}".encode()).digest()
    slot = await _slot_to_change(parts, user_id, memory_id, deadline)
    async with parts.request_ids.taken(user_id, request_id, digest, slot, deadline) as (where, taken):
        with parts.remembered.changing(user_id, memory_id) as forgetting:
            shard, answer = await parts.dispatch.to_owner(where, DELETE, question, deadline)
            forgetting.done(shard.shard_id, answer.commit)
    if answer.deleted:
        await parts.locations.forget(memory_id)
    return pb.DeleteMemoryResponse(
        deleted=answer.deleted, receipt=parts.tokens.receipt(*taken, (shard.shard_id, answer.commit))
    )


async def erase(parts: Parts, request: pb.EraseUserRequest, deadline: Deadline) -> pb.EraseUserResponse:
    """Has every shard that may hold anything of the user remove it, and every router forget what it knew of it.

    All of them, and their standbys, or it is to be asked again.
    """
    user_id = validate.user_id(request.user_id, "user_id")
    request_id = validate.request_id(request.request_id) or str(uuid.uuid4())
    question = shard_pb2.EraseRequest(user_id=user_id, request_id=request_id)
    totals, answers = await _removed(parts, question, deadline)
    embeddings = parts.remembered.embeddings
    # What was made of the texts of memories may outlive the last trace of these.
    of_texts = embeddings is not None and embeddings.keeps_users_texts
    while True:
        # The shards name them, this attempt's and those of one before, until they hear that all caches forgot them.
        ids = [memory_id for _, answer in answers for memory_id in answer.ids][:_MOST_FORGOTTEN]
        if ids or of_texts:
            of_texts = False
            await parts.invalidations.forget_everywhere(
                parts.remembered.of(user_id), [parts.remembered.erased(user_id), *ids], deadline
            )
        # From a standby that has them still they could be remembered again. The shards keep the ids until they hear
        # that they are forgotten, which is said of no ids before all standbys are known to have lost them.
        if not ids or any(answer.unconfirmed for _, answer in answers):
            break
        del question.forgotten[:]
        question.forgotten.extend(ids)
        answers = await _erase_on_shards(parts, question, deadline)
    parts.remembered.erase(user_id)
    behind = [standby for _, answer in answers for standby in answer.unconfirmed]
    if behind:
        raise Unavailable(
            f"erased, and not known to be on the standbys {', '.join(behind)}; the same request again settles it",
            reason="ERASE_UNCONFIRMED",
            metadata={"standbys": ",".join(behind)},
        )
    return pb.EraseUserResponse(
        memories_erased=totals.memories_erased,
        versions_erased=totals.versions_erased,
        receipt=parts.tokens.receipt(*((shard.shard_id, answer.commit) for shard, answer in answers)),
    )


async def _removed(
    parts: Parts, question: shard_pb2.EraseRequest, deadline: Deadline
) -> tuple[shard_pb2.EraseResponse, list[tuple[Shard, shard_pb2.EraseResponse]]]:
    """Has all of the user removed, unless this very request is over; the totals, and the answers of all shards.

    What is asked with `question` afterwards removes nothing. Raises Unavailable when an answer is missing.
    """
    if parts.placement.user_slot(question.user_id) is not None:
        ((shard, answer),) = await _erase_on_shards(parts, question, deadline)
        return answer, [(shard, answer)]
    # By the time that it is repeated, slots may have moved: what one shard did says nothing of those that it has then.
    home = slot_of(question.user_id.encode())
    both = f"{len(question.user_id)} {question.user_id} {question.request_id}"
    at_home = shard_pb2.EraseRequest(
        request_id=hashlib.sha256(both.encode()).hexdigest(), part=shard_pb2.ERASE_PART_FIND
    )
    _, known = await parts.dispatch.to_owner(home, ERASE, at_home, deadline)
    question.part = shard_pb2.ERASE_PART_SETTLE if known.over else shard_pb2.ERASE_PART_REMOVE
    answers = await _erase_on_shards(parts, question, deadline)
    if known.over:
        return known, answers
    question.part = shard_pb2.ERASE_PART_SETTLE
    at_home.part = shard_pb2.ERASE_PART_RECORD
    at_home.memories_erased = sum(answer.memories_erased for _, answer in answers)
    at_home.versions_erased = sum(answer.versions_erased for _, answer in answers)
    shard, known = await parts.dispatch.to_owner(home, ERASE, at_home, deadline)
    if not known.over:
        # A shard of an older version.
        known = shard_pb2.EraseResponse(
            memories_erased=at_home.memories_erased, versions_erased=at_home.versions_erased, commit=known.commit
        )
    return known, [*answers, (shard, known)]


async def _erase_on_shards(
    parts: Parts, question: shard_pb2.EraseRequest, deadline: Deadline
) -> list[tuple[Shard, shard_pb2.EraseResponse]]:
    """The answers of all shards that may hold anything of the user. Raises Unavailable when one is missing."""
    slot = parts.placement.user_slot(question.user_id)
    if slot is not None:
        return [await parts.dispatch.to_owner(slot, ERASE, question, deadline)]
    gathered = await parts.fanout.ask_all(ERASE, question, deadline)
    gathered.require_all()
    return list(gathered.answers)


async def _slot_to_change(parts: Parts, user_id: str, memory_id: str, deadline: Deadline) -> int:
    """The memory's slot. What was never there is changed in the id's home slot, in vain: the answer is kept there."""
    slot = await slot_of_memory(parts.placement, parts.dispatch, user_id, memory_id, deadline)
    return home_slot(user_id, memory_id) if slot is None else slot


def _digest_of_change(change: pb.UpdateMemoryRequest) -> bytes:
    """Equal for the same update sent again, whatever embedding is added to it here."""
    expected = str(change.expected_version) if change.HasField("expected_version") else ""
    parts = ["memshard update 1", *change.update_mask.paths, "", expected]
    return hashlib.sha256("\0".join(parts).encode() + b"\0" + digest_of(change.memory)).digest()
