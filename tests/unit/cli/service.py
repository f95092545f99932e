"""An in-memory MemoryService for tests of what commands print; what a cluster does is tested on a real one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from memshard.v1 import memory_pb2 as pb
from tests.unit.sdk.server import info, serving, status


class MemoryService:
    """Holds memories in a dict. A test may set what goes wrong.

    Attributes:
        stored: what is held, by user and id.
        fail_store: called with each store request; may abort through the context.
        report: what reads report.
    """

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], pb.Memory] = {}
        self.fail_store: Callable[[pb.StoreMemoryRequest, grpc.ServicerContext], None] = lambda request, context: None
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
            GetMemory=self.get,
            DeleteMemory=self.delete,
            ListMemories=self.list,
            SearchMemories=self.search,
        ) as address:
            yield address

    def store(self, request: pb.StoreMemoryRequest, context: grpc.ServicerContext) -> pb.StoreMemoryResponse:
        self.fail_store(request, context)
        memory = request.memory
        if memory.content == "bad":
            violation = error_details_pb2.BadRequest.FieldViolation(field="memory.content", description="is bad")
            refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "memory.content: is bad",
                info("BAD_CONTENT"),
                error_details_pb2.BadRequest(field_violations=[violation]),
            )
        before = self.stored.setdefault((memory.user_id, memory.id), memory)
        if before != memory:
            refuse(context, grpc.StatusCode.ALREADY_EXISTS, "the id is taken", info("ID_TAKEN"))
        answer = pb.Memory()
        answer.CopyFrom(before)
        answer.version = 1
        answer.create_time.FromJsonString("2030-01-02T03:04:05.5Z")
        answer.embedding_state = pb.EMBEDDING_STATE_READY
        receipt = pb.WriteReceipt(consistency_token=b"\x01\x02", durability=pb.DURABILITY_LOCAL)
        return pb.StoreMemoryResponse(memory=answer, receipt=receipt)

    def get(self, request: pb.GetMemoryRequest, context: grpc.ServicerContext) -> pb.GetMemoryResponse:
        for (user_id, memory_id), memory in self.stored.items():
            if memory_id == request.id and request.user_id in {"", user_id}:
                return pb.GetMemoryResponse(memory=memory, report=self.report)
        refuse(context, grpc.StatusCode.NOT_FOUND, "no such memory", info("MEMORY_NOT_FOUND"))
        raise AssertionError("aborting raises")

    def delete(self, request: pb.DeleteMemoryRequest, context: grpc.ServicerContext) -> pb.DeleteMemoryResponse:
        found = self.stored.pop((request.user_id, request.id), None)
        return pb.DeleteMemoryResponse(deleted=found is not None)

    def list(self, request: pb.ListMemoriesRequest, context: grpc.ServicerContext) -> pb.ListMemoriesResponse:
        mine = [memory for (user_id, _), memory in self.stored.items() if user_id == request.user_id]
        start = int(request.page_token or 0)
        end = start + min(request.page_size, 3)  # Short pages, as a server may give.
        token = str(end) if end < len(mine) else ""
        return pb.ListMemoriesResponse(memories=mine[start:end], next_page_token=token, report=self.report)

    def search(self, request: pb.SearchMemoriesRequest, context: grpc.ServicerContext) -> pb.SearchMemoriesResponse:
        found = [memory for (user_id, _), memory in self.stored.items() if request.user_id in {"", user_id}]
        return pb.SearchMemoriesResponse(
            results=[pb.ScoredMemory(memory=memory, score=0.875) for memory in found[: request.limit]],
            score_kind=pb.SCORE_KIND_COSINE,
            report=self.report,
        )


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, *details: Message) -> None:
    """Ends the call with this status."""
    context.abort_with_status(rpc_status.to_status(status(code, message, *details)))
