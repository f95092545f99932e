"""Fetching one memory of one user: from what is remembered, if that is as fresh as asked for, else from the shard."""

from dataclasses import dataclass

from common import tracing
from common.deadline import Deadline
from common.errors import NotFound
from common.level import Level
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import Consistency
from router.levels import Levels
from router.memories import Kept, Question
from router.parts import Parts
from router.report import Origin, report
from router.resolve import slot_of_memory
from router.shards import GET
from router.stamps import Stamp


@dataclass(frozen=True, slots=True)
class Answer:
    """A GetMemoryResponse without a report, and what that is to say."""

    encoded: bytes
    origin: Origin
    stamp: Stamp | None = None


async def get(parts: Parts, question: Question, consistency: Consistency, deadline: Deadline) -> bytes:
    """The memory, as the bytes of an answer. Raises NotFound, and what `Dispatch.read` raises."""
    kept = parts.memories.find(question, consistency, parts.watch.topology)
    if kept is not None:
        parts.dispatch.admit(kept.slot, GET)
        # One message behind the other is both in one: protobuf merges what follows.
        return kept.encoded + _report_of_cache(parts.levels, kept)
    if consistency.strong:
        # What is under way already may have been read before something that this caller knows to be there.
        answer = await _ask(parts, question, consistency, deadline)
    else:
        answer = await _look_together(parts, question, consistency, deadline)
        # Of who waited for another's read as well, whose span knows neither.
        parts.levels.tell_trace(answer.origin.shard_ids)
        if "cache" in answer.origin.served_by:
            tracing.current().set("memshard.cache.hit", True)
    return answer.encoded + _encoded(report(parts.levels, answer.origin))


async def _look_together(parts: Parts, question: Question, consistency: Consistency, deadline: Deadline) -> Answer:
    """The same look for all who want the same memory as fresh, and nothing has been forgotten of since it began."""
    key = (question, consistency.key, parts.memories.forgotten_at(question.memory_id))
    answer: Answer
    answer, is_own = await parts.flights.run(key, deadline, lambda: _look(parts, question, consistency, deadline))
    if not is_own and consistency.max_staleness_ms:
        # It was fresh enough for who came first. This one came later.
        topology = parts.watch.topology
        if answer.stamp is None or not answer.stamp.satisfies(consistency, topology.cutovers, parts.memories.now()):
            return await _look(parts, question, consistency, deadline)
    return answer


async def _look(parts: Parts, question: Question, consistency: Consistency, deadline: Deadline) -> Answer:
    """What Redis has, if it is fresh enough, or else the shard."""
    if parts.memories_redis.is_on:
        found = await parts.memories_redis.find(
            question, lambda kept: parts.memories.may_answer(kept, question, consistency, parts.watch.topology)
        )
        if found is not None:
            kept, memory = found
            parts.dispatch.admit(kept.slot, GET)
            parts.memories.remember(question, kept, memory)
            return Answer(kept.encoded, Origin.of_cache(kept.stamp.shard_id), kept.stamp)
    return await _ask(parts, question, consistency, deadline)


async def _ask(parts: Parts, question: Question, consistency: Consistency, deadline: Deadline) -> Answer:
    """What the shard has, which is remembered."""
    asked_at, era = parts.memories.now(), parts.memories_redis.era
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
    memory = answered.answer.found[0].memory
    encoded = pb.GetMemoryResponse(memory=memory).SerializeToString()
    if not answered.answer.HasField("stamp"):
        return Answer(encoded, answered.origin)
    stamp = Stamp.of_answer(answered.shard.shard_id, answered.answer.stamp, asked_at)
    kept = Kept(user_id, slot, encoded, stamp)
    parts.memories.remember(question, kept, memory)
    if not consistency.strong:
        # Who asks for strong reads alone should not pay for writing what they never look at.
        parts.memories_redis.keep_soon(question, kept, memory, era)
    return Answer(encoded, answered.origin, stamp)


# There are few levels, and the report of an answer from here says nothing else that could differ.
_reports: dict[Level, bytes] = {}


def _report_of_cache(levels: Levels, kept: Kept) -> bytes:
    level = levels.of((kept.stamp.shard_id,))
    if level not in _reports:
        _reports[level] = _encoded(report(levels, Origin.of_cache(kept.stamp.shard_id)))
    return _reports[level]


def _encoded(of_answer: pb.ReadReport) -> bytes:
    return pb.GetMemoryResponse(report=of_answer).SerializeToString()
