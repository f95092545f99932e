"""Fetching one memory of one user: from what is remembered, if that is as fresh as asked for, else from the shard."""

from typing import NamedTuple

from common.deadline import Deadline
from common.errors import NotFound
from common.level import Level
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import Consistency
from router.dispatch import Answered
from router.levels import Levels
from router.memories import Kept
from router.parts import Parts
from router.report import Origin, report
from router.resolve import slot_of_memory
from router.shards import GET
from router.stamps import Stamp


class Question(NamedTuple):
    """Which memory is wanted, and how much of it."""

    user_id: str
    memory_id: str
    include_embedding: bool


async def get(
    parts: Parts, question: Question, consistency: Consistency, deadline: Deadline
) -> pb.GetMemoryResponse | bytes:
    """The memory, as an answer or as the bytes of one. Raises NotFound, and what `Dispatch.read` raises."""
    kept = parts.memories.find(
        question.user_id,
        question.memory_id,
        include_embedding=question.include_embedding,
        consistency=consistency,
        topology=parts.watch.topology,
    )
    if kept is not None:
        parts.dispatch.admit(kept.slot, GET)
        # One message behind the other is both in one (protobuf's encoding, "Last One Wins" and merging).
        return kept.encoded + _report_of_cache(parts.levels, kept)
    found, answered = await _ask(parts, question, consistency, deadline)
    return pb.GetMemoryResponse(memory=found.memory, report=report(parts.levels, answered.origin))


async def _ask(
    parts: Parts, question: Question, consistency: Consistency, deadline: Deadline
) -> tuple[shard_pb2.FoundMemory, Answered[shard_pb2.GetResponse]]:
    """What the shard has, which is remembered."""
    asked_at = parts.memories.now()
    user_id, memory_id, include_embedding = question
    missing = NotFound(f"this user has no memory {memory_id}")
    slot = await slot_of_memory(parts.placement, parts.dispatch, user_id, memory_id, deadline, consistency)
    if slot is None:
        raise missing
    request = shard_pb2.GetRequest(
        id=memory_id, user_id=user_id, include_embedding=include_embedding, stamped=parts.memories.is_on
    )
    answered = await parts.dispatch.read(slot, GET, request, consistency, deadline)
    if not answered.answer.found:
        raise missing
    found = answered.answer.found[0]
    if answered.answer.HasField("stamp"):
        stamp = Stamp.of_answer(answered.shard.shard_id, answered.answer.stamp, asked_at)
        parts.memories.remember(found.memory, slot, stamp, include_embedding=include_embedding)
    return found, answered


# There are few levels, and the report of an answer from here says nothing else that could differ.
_reports: dict[Level, bytes] = {}


def _report_of_cache(levels: Levels, kept: Kept) -> bytes:
    level = levels.of((kept.stamp.shard_id,))
    if level not in _reports:
        of_cache = report(levels, Origin.of_cache(kept.stamp.shard_id))
        _reports[level] = pb.GetMemoryResponse(report=of_cache).SerializeToString()
    return _reports[level]
