"""An in-memory MemoryService for tests of what commands print; what a cluster does is tested on a real one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from memshard.v1 import memory_pb2 as pb
from tests.unit.sdk.server import info, serving, status


class MemoryService:
    """Holds memories in a dict. A test may set what goes wrong.

    Attributes:
        stored: what is held, by user and id.
        fail_store: called with each request to store one or many; may abort through the context.
        requests: all others, as they came.
        report: what reads report.
    """

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], pb.Memory] = {}
        self.fail_store: Callable[[Message, grpc.ServicerContext], None] = lambda request, context: None
        self.requests: list[Message] = []
        self.report = pb.ReadReport(
            served_by=["primary"],
            shards=pb.ShardSummary(total=2, succeeded=2),
            degradation_level=pb.DEGRADATION_LEVEL_NORMAL,
        )

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serves on a free port; gives the address."""
        with serving(
            StoreMemory=self.store,
            BatchStoreMemories=self.store_many,
            GetMemory=self.get,
            UpdateMemory=self.update,
            ListMemoryVersions=self.versions,
            EraseUser=self.erase,
            DeleteMemory=self.delete,
            ListMemories=self.list,
            SearchMemories=self.search,
        ) as address:
            yield address

    def store(self, request: pb.StoreMemoryRequest, context: grpc.ServicerContext) -> pb.StoreMemoryResponse:
        self.fail_store(request, context)
        if error := self._keep(request.memory, "memory"):
            context.abort_with_status(rpc_status.to_status(error))
        memory = self._as_stored(request.memory)
        receipt = pb.WriteReceipt(consistency_token=b"\x01\x02", durability=pb.DURABILITY_LOCAL)
        return pb.StoreMemoryResponse(memory=memory, receipt=receipt)

    def store_many(
        self, request: pb.BatchStoreMemoriesRequest, context: grpc.ServicerContext
    ) -> pb.BatchStoreMemoriesResponse:
        self.fail_store(request, context)
        response = pb.BatchStoreMemoriesResponse()
        for index, memory in enumerate(request.memories):
            if error := self._keep(memory, f"memories[{index}]"):
                response.results.add(error=error)
            else:
                response.results.add(id=memory.id)
        return response

    def _keep(self, memory: pb.Memory, path: str) -> status_pb2.Status | None:
        """Holds the memory, or says why not."""
        if memory.content == "bad":
            violation = error_details_pb2.BadRequest.FieldViolation(field=f"{path}.content", description="is bad")
            bad = error_details_pb2.BadRequest(field_violations=[violation])
            return status(grpc.StatusCode.INVALID_ARGUMENT, f"{path}.content: is bad", info("BAD_CONTENT"), bad)
        if self.stored.setdefault((memory.user_id, memory.id), memory) != memory:
            return status(grpc.StatusCode.ALREADY_EXISTS, "the id is taken", info("ID_TAKEN"))
        return None

    def _as_stored(self, memory: pb.Memory) -> pb.Memory:
        answer = pb.Memory()
        answer.CopyFrom(memory)
        answer.version = 1
        answer.create_time.FromJsonString("2030-01-02T03:04:05.5Z")
        answer.embedding_state = pb.EMBEDDING_STATE_READY
        return answer

    def update(self, request: pb.UpdateMemoryRequest, context: grpc.ServicerContext) -> pb.UpdateMemoryResponse:
        self.requests.append(request)
        if request.expected_version == 9:
            refuse(context, grpc.StatusCode.ABORTED, "the memory is at version 1", info("VERSION_MISMATCH"))
        memory = pb.Memory(id=request.memory.id, user_id=request.memory.user_id, version=2)
        request.update_mask.MergeMessage(request.memory, memory)
        return pb.UpdateMemoryResponse(memory=memory)

    def versions(
        self, request: pb.ListMemoryVersionsRequest, context: grpc.ServicerContext
    ) -> pb.ListMemoryVersionsResponse:
        self.requests.append(request)
        newest = int(request.page_token or 5 * (request.id != "none"))
        oldest = max(newest - 2, 0)  # Short pages, as a server may give.
        versions = [
            pb.Memory(id=request.id, user_id=request.user_id, version=number, content=f"text-{number}")
            for number in range(newest, oldest, -1)
        ]
        return pb.ListMemoryVersionsResponse(versions=versions, next_page_token=str(oldest) if oldest else "")

    def erase(self, request: pb.EraseUserRequest, context: grpc.ServicerContext) -> pb.EraseUserResponse:
        self.requests.append(request)
        gone = [key for key in self.stored if key[0] == request.user_id]
        for key in gone:
            del self.stored[key]
        return pb.EraseUserResponse(memories_erased=len(gone), versions_erased=1)

    def get(self, request: pb.GetMemoryRequest, context: grpc.ServicerContext) -> pb.GetMemoryResponse:
        self.requests.append(request)
        for (user_id, memory_id), memory in self.stored.items():
            if memory_id == request.id and request.user_id in {"", user_id}:
                return pb.GetMemoryResponse(memory=memory, report=self.report)
        refuse(context, grpc.StatusCode.NOT_FOUND, "no such memory", info("MEMORY_NOT_FOUND"))
        raise AssertionError("aborting raises")

    def delete(self, request: pb.DeleteMemoryRequest, context: grpc.ServicerContext) -> pb.DeleteMemoryResponse:
        found = self.stored.pop((request.user_id, request.id), None)
        return pb.DeleteMemoryResponse(deleted=found is not None)

    def list(self, request: pb.ListMemoriesRequest, context: grpc.ServicerContext) -> pb.ListMemoriesResponse:
        self.requests.append(request)
        mine = [memory for (user_id, _), memory in self.stored.items() if user_id == request.user_id]
        start = int(request.page_token or 0)
        end = start + min(request.page_size, 3)  # Short pages, as a server may give.
        token = str(end) if end < len(mine) else ""
        return pb.ListMemoriesResponse(memories=mine[start:end], next_page_token=token, report=self.report)

    def search(self, request: pb.SearchMemoriesRequest, context: grpc.ServicerContext) -> pb.SearchMemoriesResponse:
        self.requests.append(request)
        found = [memory for (user_id, _), memory in self.stored.items() if request.user_id in {"", user_id}]
        return pb.SearchMemoriesResponse(
            results=[pb.ScoredMemory(memory=memory, score=0.875) for memory in found[: request.limit]],
            score_kind=pb.SCORE_KIND_COSINE,
            report=self.report,
        )


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, *details: Message) -> None:
    """Ends the call with this status."""
    context.abort_with_status(rpc_status.to_status(status(code, message, *details)))
