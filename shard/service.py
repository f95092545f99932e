"""ShardService: each method checks where the request was meant to go, then reads or writes."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.config import ShardSettings
from common.deadline import Deadline
from common.errors import InvalidArgument, WrongShard
from common.postgres import Connection
from common.slots import SLOT_COUNT
from memshard.internal.v1 import shard_pb2
from shard import identity, reads, writes
from shard.commits import Commits
from shard.database import Database
from shard.identity import Identity

T = TypeVar("T")


class ShardServicer:
    """The shard's side of memshard.internal.v1.ShardService."""

    def __init__(self, settings: ShardSettings, known: Identity, database: Database, commits: Commits) -> None:
        self._settings = settings
        self._identity = known
        self._database = database
        self._commits = commits

    async def Store(self, request: shard_pb2.StoreRequest, deadline: Deadline) -> shard_pb2.StoreResponse:
        slot = self._slot(request.route)
        self._check_embedding(len(request.memory.embedding))

        async def write(connection: Connection) -> shard_pb2.StoreResponse:
            memory = await writes.store(connection, self._identity, slot, request.memory, request.digest)
            return shard_pb2.StoreResponse(memory=memory, commit=await writes.read_position(connection))

        return await self._write(write, deadline)

    async def Delete(self, request: shard_pb2.DeleteRequest, deadline: Deadline) -> shard_pb2.DeleteResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> shard_pb2.DeleteResponse:
            deleted = await writes.delete(connection, slot, request.user_id, request.id, request.request_id)
            return shard_pb2.DeleteResponse(deleted=deleted, commit=await writes.read_position(connection))

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
        self._slot(request.route)
        return await self._read(lambda c: reads.list_page(c, request, self._settings.page_bytes), deadline)

    async def Search(self, request: shard_pb2.SearchRequest, deadline: Deadline) -> shard_pb2.SearchResponse:
        self._check_route(request.route)
        self._check_embedding(len(request.embedding))
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
            except reads.NotServedError:
                raise self._wrong_shard(await identity.read_epoch(connection)) from None

    async def _write(self, write: Callable[[Connection], Awaitable[T]], deadline: Deadline) -> T:
        acquired = await self._database.to_write(deadline)

        async def commit() -> T:
            async with acquired.entered() as connection:
                try:
                    return await write(connection)
                except writes.NotOwnedError:
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

    def _check_embedding(self, length: int) -> None:
        if length != self._identity.dimensions:
            raise InvalidArgument.field(
                "embedding", "WRONG_DIMENSION", f"has {length} numbers, not {self._identity.dimensions}"
            )

    def _wrong_shard(self, epoch: int) -> WrongShard:
        return WrongShard(
            f"not served by {self._identity.shard_id} of cluster {self._identity.cluster_id}", epoch=epoch
        )
