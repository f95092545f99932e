"""MemoryService: each method checks how fresh the answer must be, and calls the module that is named by its step."""

from typing import TypeVar

from common.deadline import Deadline
from common.rpc import add_trailer
from memshard.v1 import memory_pb2 as pb
from router import changes, gets, listings, searches, stores, validate
from router.consistency import STRONG, Consistency, consistency
from router.locate import Locator
from router.memories import Question
from router.parts import Parts
from router.report import report

W = TypeVar(
    "W",
    pb.StoreMemoryResponse,
    pb.BatchStoreMemoriesResponse,
    pb.UpdateMemoryResponse,
    pb.DeleteMemoryResponse,
    pb.EraseUserResponse,
)


class MemoryServicer:
    """The router's side of memshard.v1.MemoryService."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._locator = Locator(parts.locations, parts.dispatch, parts.fanout)

    async def StoreMemory(self, request: pb.StoreMemoryRequest, deadline: Deadline) -> pb.StoreMemoryResponse:
        return self._receipted(await stores.store(self._parts, request, deadline))

    async def BatchStoreMemories(
        self, request: pb.BatchStoreMemoriesRequest, deadline: Deadline
    ) -> pb.BatchStoreMemoriesResponse:
        return self._receipted(await stores.store_batch(self._parts, request, deadline))

    async def GetMemory(self, request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse | bytes:
        memory_id = validate.memory_id(request.id, "id")
        user_id = validate.optional_user_id(request.user_id, "user_id")
        wanted = await self._consistency(request.read, deadline)
        if not user_id:
            located = await self._locator.get(
                memory_id, deadline, include_embedding=request.include_embedding, consistency=wanted
            )
            return pb.GetMemoryResponse(memory=located.memory, report=report(self._parts.levels, located.origin))
        question = Question(user_id, memory_id, request.include_embedding)
        return await gets.get(self._parts, question, wanted, deadline)

    async def UpdateMemory(self, request: pb.UpdateMemoryRequest, deadline: Deadline) -> pb.UpdateMemoryResponse:
        return self._receipted(await changes.update(self._parts, request, deadline))

    async def DeleteMemory(self, request: pb.DeleteMemoryRequest, deadline: Deadline) -> pb.DeleteMemoryResponse:
        return self._receipted(await changes.delete(self._parts, request, deadline))

    async def ListMemories(self, request: pb.ListMemoriesRequest, deadline: Deadline) -> pb.ListMemoriesResponse:
        wanted = await self._consistency(request.read, deadline)
        return await listings.list_memories(self._parts, request, wanted, deadline)

    async def ListMemoryVersions(
        self, request: pb.ListMemoryVersionsRequest, deadline: Deadline
    ) -> pb.ListMemoryVersionsResponse:
        return await listings.list_versions(self._parts, request, deadline)

    async def SearchMemories(self, request: pb.SearchMemoriesRequest, deadline: Deadline) -> pb.SearchMemoriesResponse:
        wanted = await self._consistency(request.read, deadline)
        return await searches.search(self._parts, request, wanted, deadline)

    async def EraseUser(self, request: pb.EraseUserRequest, deadline: Deadline) -> pb.EraseUserResponse:
        return self._receipted(await changes.erase(self._parts, request, deadline))

    async def _consistency(self, options: pb.ReadOptions, deadline: Deadline) -> Consistency:
        """How fresh a read must be."""
        validate.read_options(options)
        said = self._parts.tokens.said(options)
        for key, value in self._parts.tokens.read_trailers(options, said):
            add_trailer(key, value)
        wanted = consistency(options, said.positions)
        if wanted.positions and said.epoch > self._parts.watch.topology.epoch:
            await self._parts.watch.refresh(said.epoch, deadline)
            if said.epoch > self._parts.watch.topology.epoch:
                # What was written may have moved since to where this router does not know of. The primary of whoever
                # had it knows; a replica may not, yet.
                return STRONG
        return wanted

    def _receipted(self, response: W) -> W:
        """The answer to a write, with what callers who keep its token want to know of it."""
        for key, value in self._parts.tokens.write_trailers(response.receipt):
            add_trailer(key, value)
        return response
