"""MemoryService: each method checks how fresh the answer must be, and calls the module that is named by its step."""

from common.deadline import Deadline
from common.errors import NotFound
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router import changes, listings, searches, stores, validate
from router.locate import Locator
from router.parts import Parts
from router.report import ONE_SHARD, report
from router.resolve import slot_of_memory
from router.shards import GET


class MemoryServicer:
    """The router's side of memshard.v1.MemoryService."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._locator = Locator(parts.locations, parts.dispatch, parts.fanout)

    async def StoreMemory(self, request: pb.StoreMemoryRequest, deadline: Deadline) -> pb.StoreMemoryResponse:
        return await stores.store(self._parts, request, deadline)

    async def BatchStoreMemories(
        self, request: pb.BatchStoreMemoriesRequest, deadline: Deadline
    ) -> pb.BatchStoreMemoriesResponse:
        return await stores.store_batch(self._parts, request, deadline)

    async def GetMemory(self, request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        memory_id = validate.memory_id(request.id, "id")
        user_id = validate.optional_user_id(request.user_id, "user_id")
        self._check_read(request.read)
        if not user_id:
            located = await self._locator.get(memory_id, deadline, include_embedding=request.include_embedding)
            return pb.GetMemoryResponse(memory=located.memory, report=report(located.shards))
        missing = NotFound(f"this user has no memory {memory_id}")
        slot = await slot_of_memory(self._parts.placement, self._parts.dispatch, user_id, memory_id, deadline)
        if slot is None:
            raise missing
        question = shard_pb2.GetRequest(id=memory_id, user_id=user_id, include_embedding=request.include_embedding)
        _, answer = await self._parts.dispatch.to_owner(slot, GET, question, deadline)
        if not answer.found:
            raise missing
        return pb.GetMemoryResponse(memory=answer.found[0].memory, report=report(ONE_SHARD))

    async def UpdateMemory(self, request: pb.UpdateMemoryRequest, deadline: Deadline) -> pb.UpdateMemoryResponse:
        return await changes.update(self._parts, request, deadline)

    async def DeleteMemory(self, request: pb.DeleteMemoryRequest, deadline: Deadline) -> pb.DeleteMemoryResponse:
        return await changes.delete(self._parts, request, deadline)

    async def ListMemories(self, request: pb.ListMemoriesRequest, deadline: Deadline) -> pb.ListMemoriesResponse:
        self._check_read(request.read)
        return await listings.list_memories(self._parts, request, deadline)

    async def ListMemoryVersions(
        self, request: pb.ListMemoryVersionsRequest, deadline: Deadline
    ) -> pb.ListMemoryVersionsResponse:
        return await listings.list_versions(self._parts, request, deadline)

    async def SearchMemories(self, request: pb.SearchMemoriesRequest, deadline: Deadline) -> pb.SearchMemoriesResponse:
        self._check_read(request.read)
        return await searches.search(self._parts, request, deadline)

    async def EraseUser(self, request: pb.EraseUserRequest, deadline: Deadline) -> pb.EraseUserResponse:
        return await changes.erase(self._parts, request, deadline)

    def _check_read(self, options: pb.ReadOptions) -> None:
        """Every read is served by the primary so far, which is as fresh as any level asks for."""
        validate.read_options(options)
        self._parts.tokens.check_consistency(options)
