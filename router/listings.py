"""Listing a user's memories, and the versions of one."""

from common.deadline import Deadline
from common.errors import NotFound
from common.rpc import add_trailer
from memshard.internal.v1 import shard_pb2, tokens_pb2
from memshard.v1 import memory_pb2 as pb
from router import filters, validate
from router.consistency import Consistency
from router.merge import merge_page
from router.parts import Parts
from router.report import Origin, report
from router.resolve import slot_of_memory
from router.shards import LIST, LIST_VERSIONS

# The level at which versions were listed: the contract has no field for it, as every other answer does.
LEVEL_TRAILER = "memshard-degradation-level"


async def list_memories(
    parts: Parts, request: pb.ListMemoriesRequest, consistency: Consistency, deadline: Deadline
) -> pb.ListMemoriesResponse:
    """One page, from the shard that has the user, or merged from all: then none of them may be missing."""
    user_id = validate.user_id(request.user_id, "user_id")
    page_size = validate.page_size(request.page_size)
    if request.HasField("filter"):
        filters.check(request.filter)
    start = parts.tokens.page_start(request)
    question = shard_pb2.ListRequest(
        user_id=user_id,
        page_size=page_size,
        after=start.after if start.HasField("after") else None,
        include_embedding=request.include_embedding,
        filter=request.filter if request.HasField("filter") else None,
    )
    memories, following, origin = await newest(parts, question, consistency, deadline)
    token = parts.tokens.next_page(request, tokens_pb2.PageToken(after=following)) if following else ""
    return pb.ListMemoriesResponse(memories=memories, next_page_token=token, report=report(parts.levels, origin))


async def newest(
    parts: Parts, question: shard_pb2.ListRequest, consistency: Consistency, deadline: Deadline
) -> tuple[list[pb.Memory], shard_pb2.ListPosition | None, Origin]:
    """A page of a user's memories, newest first, where the next one begins, and where they come from."""
    slot = parts.placement.user_slot(question.user_id)
    if slot is not None:
        answered = await parts.dispatch.read(slot, LIST, question, consistency, deadline)
        page = answered.answer
        return list(page.memories), page.next if page.HasField("next") else None, answered.origin
    gathered = await parts.fanout.ask_all(LIST, question, deadline, consistency)
    # A page without one shard's memories would skip them for good.
    gathered.require_all()
    memories, following = merge_page([answer for _, answer in gathered.answers], question.page_size)
    return memories, following, gathered.origin


async def list_versions(
    parts: Parts, request: pb.ListMemoryVersionsRequest, deadline: Deadline
) -> pb.ListMemoryVersionsResponse:
    """One page of versions, newest first, as the primary has them. Raises NotFound when there is none at all."""
    memory_id = validate.memory_id(request.id, "id")
    user_id = validate.user_id(request.user_id, "user_id")
    page_size = validate.page_size(request.page_size)
    start = parts.tokens.page_start(request)
    missing = NotFound(f"this user has no memory {memory_id}")
    slot = await slot_of_memory(parts.placement, parts.dispatch, user_id, memory_id, deadline)
    if slot is None:
        raise missing
    question = shard_pb2.ListVersionsRequest(
        id=memory_id, user_id=user_id, page_size=page_size, before_version=start.before_version
    )
    shard, answer = await parts.dispatch.to_owner(slot, LIST_VERSIONS, question, deadline)
    add_trailer(LEVEL_TRAILER, parts.levels.of((shard.shard_id,)).name.lower())
    if not answer.versions and not request.page_token:
        raise missing
    token = ""
    if answer.more:
        following = tokens_pb2.PageToken(before_version=answer.versions[-1].version)
        token = parts.tokens.next_page(request, following)
    return pb.ListMemoryVersionsResponse(versions=answer.versions, next_page_token=token)
