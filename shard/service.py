"""ShardService: each method checks where the request was meant to go, then reads or writes."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.rpc import status_pb2

from common.config import ShardSettings
from common.deadline import Deadline
from common.errors import MemshardError
from common.postgres import Connection
from common.status import to_status
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import changes, claims, erase, identity, reads, store
from shard.commits import Commits
from shard.database import Database
from shard.embedding_queue import EmbeddingQueue
from shard.identity import Identity
from shard.ownership import NotOwnedError
from shard.position import read_position
from shard.read_service import Read, ReadServicer

T = TypeVar("T")


class ShardServicer(ReadServicer):
    """The shard's side of memshard.internal.v1.ShardService."""

    def __init__(
        self, settings: ShardSettings, known: Identity, database: Database, commits: Commits, queue: EmbeddingQueue
    ) -> None:
        super().__init__(known, settings.page_bytes)
        self._database = database
        self._commits = commits
        self._queue = queue

    async def Store(self, request: shard_pb2.StoreRequest, deadline: Deadline) -> shard_pb2.StoreResponse:
        slot = self._slot(request.route)
        self._check_embedding(request.memory)

        async def write(connection: Connection) -> shard_pb2.StoreResponse:
            memory, deleted = await store.store(connection, self._identity, slot, request.memory, request.digest)
            if not request.memory.embedding:
                self._queue.wake()
            return shard_pb2.StoreResponse(memory=memory, commit=await read_position(connection), deleted=deleted)

        return await self._write(write, deadline)

    async def StoreBatch(
        self, request: shard_pb2.StoreBatchRequest, deadline: Deadline
    ) -> shard_pb2.StoreBatchResponse:
        self._check_route(request.route)
        for item in request.items:
            self._check_embedding(item.memory)

        async def write(connection: Connection) -> shard_pb2.StoreBatchResponse:
            outcomes = await store.store_many(connection, self._identity, request.items)
            epoch = await _epoch_if_needed(connection, outcomes)
            self._queue.wake()
            return shard_pb2.StoreBatchResponse(
                outcomes=[
                    shard_pb2.StoreOutcome(deleted=True)
                    if isinstance(outcome, store.Deleted)
                    else shard_pb2.StoreOutcome(error=self._item_error(outcome, epoch))
                    for outcome in outcomes
                ],
                commit=await read_position(connection),
            )

        return await self._write(write, deadline)

    async def Claim(self, request: shard_pb2.ClaimRequest, deadline: Deadline) -> shard_pb2.ClaimResponse:
        self._check_route(request.route)

        async def write(connection: Connection) -> shard_pb2.ClaimResponse:
            outcomes = await claims.claim(connection, request.items)
            epoch = await _epoch_if_needed(connection, outcomes)
            return shard_pb2.ClaimResponse(
                outcomes=[shard_pb2.ClaimOutcome(error=self._item_error(outcome, epoch)) for outcome in outcomes]
            )

        return await self._write(write, deadline)

    async def Update(self, request: shard_pb2.UpdateRequest, deadline: Deadline) -> shard_pb2.UpdateResponse:
        slot = self._slot(request.route)
        self._check_embedding(request.memory)

        async def write(connection: Connection) -> shard_pb2.UpdateResponse:
            memory = await changes.update(connection, self._identity, slot, request)
            if memory.embedding_state == pb.EMBEDDING_STATE_PENDING:
                self._queue.wake()
            return shard_pb2.UpdateResponse(memory=memory, commit=await read_position(connection))

        return await self._write(write, deadline)

    async def Erase(self, request: shard_pb2.EraseRequest, deadline: Deadline) -> shard_pb2.EraseResponse:
        self._check_route(request.route)
        ranges = request.route.ranges
        bounds = [asked.first for asked in ranges], [asked.last for asked in ranges]

        async def write(connection: Connection) -> shard_pb2.EraseResponse:
            erased = await erase.erase(
                connection, bounds, reads.slot_count(ranges), request.user_id, request.request_id
            )
            return shard_pb2.EraseResponse(
                memories_erased=erased.memories,
                versions_erased=erased.versions,
                ids=sorted(erased.ids),
                commit=await read_position(connection),
            )

        return await self._write(write, deadline)

    async def Delete(self, request: shard_pb2.DeleteRequest, deadline: Deadline) -> shard_pb2.DeleteResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> shard_pb2.DeleteResponse:
            deleted = await changes.delete(connection, slot, request.user_id, request.id, request.request_id)
            return shard_pb2.DeleteResponse(deleted=deleted, commit=await read_position(connection))

        return await self._write(write, deadline)

    async def Describe(self, request: shard_pb2.DescribeRequest, deadline: Deadline) -> shard_pb2.DescribeResponse:
        async with self._database.reading(deadline) as connection:
            described = await self._describe(connection)
            here = await read_position(connection)
        described.writable = True
        described.position.CopyFrom(
            shard_pb2.ShardPosition(shard_id=self._identity.shard_id, timeline=here.timeline, lsn=here.lsn)
        )
        described.durability = here.durability
        return described

    async def serve(self, read: Read[T], fresh: shard_pb2.Freshness | None, deadline: Deadline) -> T:
        """The primary is as fresh as can be."""
        async with self._database.reading(deadline) as connection:
            return await read(connection)

    async def _write(self, write: Callable[[Connection], Awaitable[T]], deadline: Deadline) -> T:
        acquired = await self._database.to_write(deadline)

        async def commit() -> T:
            async with acquired.entered() as connection:
                try:
                    return await write(connection)
                except NotOwnedError:
                    raise self._wrong_shard(await identity.read_epoch(connection)) from None

        # From here on the caller may leave, and the write goes on. Nothing is awaited between the two.
        return await self._commits.run(commit())

    def _check_embedding(self, memory: pb.Memory) -> None:
        self._check_dimensions(len(memory.embedding))

    def _item_error(self, outcome: MemshardError | NotOwnedError | None, epoch: int) -> status_pb2.Status | None:
        """What became of one item of many, as it travels; None for a success."""
        if outcome is None:
            return None
        return to_status(self._wrong_shard(epoch) if isinstance(outcome, NotOwnedError) else outcome)


async def _epoch_if_needed(connection: Connection, outcomes: Sequence[object]) -> int:
    """The epoch that WRONG_SHARD is told with, read only when some item of many is to be told that."""
    refused = any(isinstance(outcome, NotOwnedError) for outcome in outcomes)
    return await identity.read_epoch(connection) if refused else 0
