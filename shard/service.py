"""ShardService: each method checks where the request was meant to go, then reads or writes."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.rpc import status_pb2

from common.config import ShardSettings
from common.deadline import Deadline
from common.errors import InvalidArgument, MemshardError, WrongShard
from common.postgres import Connection
from common.slots import SLOT_COUNT
from common.status import to_status
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import changes, claims, erase, identity, reads, request_claims, store
from shard.commits import Commits
from shard.database import Database
from shard.embedding_queue import EmbeddingQueue
from shard.identity import Identity
from shard.ownership import NotOwnedError
from shard.position import read_position

T = TypeVar("T")


class ShardServicer:
    """The shard's side of memshard.internal.v1.ShardService."""

    def __init__(
        self, settings: ShardSettings, known: Identity, database: Database, commits: Commits, queue: EmbeddingQueue
    ) -> None:
        self._settings = settings
        self._identity = known
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

    async def FindClaim(self, request: shard_pb2.FindClaimRequest, deadline: Deadline) -> shard_pb2.FindClaimResponse:
        slot = self._slot(request.route)

        async def read(connection: Connection) -> shard_pb2.FindClaimResponse:
            return shard_pb2.FindClaimResponse(
                memory_slot=await claims.find(connection, slot, request.user_id, request.id)
            )

        return await self._read(read, deadline)

    async def TakeRequestId(
        self, request: shard_pb2.TakeRequestIdRequest, deadline: Deadline
    ) -> shard_pb2.TakeRequestIdResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> shard_pb2.TakeRequestIdResponse:
            memory_slot = await request_claims.take(
                connection, slot, request.user_id, request.request_id, request.digest, request.memory_slot
            )
            return shard_pb2.TakeRequestIdResponse(memory_slot=memory_slot)

        return await self._write(write, deadline)

    async def ReleaseRequestId(
        self, request: shard_pb2.ReleaseRequestIdRequest, deadline: Deadline
    ) -> shard_pb2.ReleaseRequestIdResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> shard_pb2.ReleaseRequestIdResponse:
            await request_claims.release(connection, slot, request.user_id, request.request_id, request.digest)
            return shard_pb2.ReleaseRequestIdResponse()

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
                connection,
                bounds,
                reads.slot_count(ranges),
                request.user_id,
                request.request_id,
                forgotten=request.forgotten,
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

    async def Get(self, request: shard_pb2.GetRequest, deadline: Deadline) -> shard_pb2.GetResponse:
        self._check_route(request.route)

        async def read(connection: Connection) -> shard_pb2.GetResponse:
            found = await reads.get(
                connection,
                request.route.ranges,
                request.id,
                request.user_id,
                include_embedding=request.include_embedding,
            )
            return shard_pb2.GetResponse(found=found)

        return await self._read(read, deadline)

    async def List(self, request: shard_pb2.ListRequest, deadline: Deadline) -> shard_pb2.ListResponse:
        self._check_route(request.route)
        return await self._read(lambda c: reads.list_page(c, request, self._settings.page_bytes), deadline)

    async def ListVersions(
        self, request: shard_pb2.ListVersionsRequest, deadline: Deadline
    ) -> shard_pb2.ListVersionsResponse:
        self._slot(request.route)
        return await self._read(lambda c: reads.list_versions(c, request, self._settings.page_bytes), deadline)

    async def Search(self, request: shard_pb2.SearchRequest, deadline: Deadline) -> shard_pb2.SearchResponse:
        self._check_route(request.route)
        self._check_dimensions(len(request.embedding))
        return await self._read(lambda c: reads.search(c, self._identity, request), deadline)

    async def Describe(self, request: shard_pb2.DescribeRequest, deadline: Deadline) -> shard_pb2.DescribeResponse:
        async with self._database.reading(deadline) as connection:
            owned = await identity.read_owned(connection)
            epoch = await identity.read_epoch(connection)
        return shard_pb2.DescribeResponse(
            cluster_id=self._identity.cluster_id,
            shard_id=self._identity.shard_id,
            epoch=epoch,
            owned=[shard_pb2.SlotRange(first=first, last=last) for first, last in owned],
        )

    async def _read(self, read: Callable[[Connection], Awaitable[T]], deadline: Deadline) -> T:
        async with self._database.reading(deadline) as connection:
            try:
                return await read(connection)
            except (reads.NotServedError, NotOwnedError):
                raise self._wrong_shard(await identity.read_epoch(connection)) from None

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

    def _slot(self, route: shard_pb2.Route) -> int:
        """The one slot of a request about one user's memory."""
        self._check_route(route)
        slot = route.ranges[0].first
        if len(route.ranges) != 1 or route.ranges[0].last != slot:
            raise InvalidArgument.field("route.ranges", "BAD_ROUTE", "must be one slot")
        return slot

    def _check_route(self, route: shard_pb2.Route) -> None:
        if (route.cluster_id, route.shard_id) != (self._identity.cluster_id, self._identity.shard_id):
            # Another shard, or another cluster, has moved to this address: nothing here is theirs to see. The epochs
            # of two clusters do not compare, so none is given.
            raise self._wrong_shard(0)
        if not route.ranges or any(not r.first <= r.last < SLOT_COUNT for r in route.ranges):
            raise InvalidArgument.field("route.ranges", "BAD_ROUTE", f"must be slots 0 to {SLOT_COUNT - 1}")

    def _check_embedding(self, memory: pb.Memory) -> None:
        self._check_dimensions(len(memory.embedding))

    def _check_dimensions(self, length: int) -> None:
        """None at all is an embedding that is to follow, or a search by words."""
        if length not in (0, self._identity.dimensions):
            raise InvalidArgument.field(
                "embedding", "WRONG_DIMENSION", f"has {length} numbers, not {self._identity.dimensions}"
            )

    def _item_error(self, outcome: MemshardError | NotOwnedError | None, epoch: int) -> status_pb2.Status | None:
        """What became of one item of many, as it travels; None for a success."""
        if outcome is None:
            return None
        return to_status(self._wrong_shard(epoch) if isinstance(outcome, NotOwnedError) else outcome)

    def _wrong_shard(self, epoch: int) -> WrongShard:
        return WrongShard(
            f"not served by {self._identity.shard_id} of cluster {self._identity.cluster_id}", epoch=epoch
        )


async def _epoch_if_needed(connection: Connection, outcomes: Sequence[object]) -> int:
    """The epoch that WRONG_SHARD is told with, read only when some item of many is to be told that."""
    refused = any(isinstance(outcome, NotOwnedError) for outcome in outcomes)
    return await identity.read_epoch(connection) if refused else 0
