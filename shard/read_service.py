"""The rpcs of ShardService that read: the same on a shard and on its replicas, but for which connection serves them."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from common.admission import Admission
from common.deadline import Deadline
from common.errors import InvalidArgument, WrongShard
from common.postgres import Connection
from common.slots import SLOT_COUNT
from memshard.internal.v1 import shard_pb2
from shard import claims, identity, reads
from shard.identity import Identity
from shard.large_users import searching
from shard.large_users.known import OwnIndexes
from shard.ownership import NotOwnedError
from shard.refusal import refusal

T = TypeVar("T")
S = TypeVar("S", shard_pb2.GetResponse, shard_pb2.SearchResponse)

Read = Callable[[Connection], Awaitable[T]]


def admission() -> Admission:
    """The limit of one server of a shard. Who asks how it is gets through at any time, and so does who helps it: when
    all places are taken by calls that hang on dead connections, new ones are what is missing."""
    return Admission(batches=frozenset({"StoreBatch", "Erase"}), free=frozenset({"Describe", "RecyclePool"}))


class ReadServicer(ABC):
    """The reading side of memshard.internal.v1.ShardService."""

    def __init__(self, known: Identity, page_bytes: int, own_indexes: OwnIndexes) -> None:
        self._identity = known
        self._own_indexes = own_indexes
        self._page_bytes = page_bytes

    @abstractmethod
    async def serve(
        self, read: Read[T], fresh: shard_pb2.Freshness | None, deadline: Deadline, *, stamped: bool
    ) -> tuple[T, shard_pb2.ReadStamp | None]:
        """Runs `read` on a connection whose server is as fresh as asked for; None: strong.

        And says how fresh that was, if it is to be `stamped`, and known.
        """

    async def FindClaim(self, request: shard_pb2.FindClaimRequest, deadline: Deadline) -> shard_pb2.FindClaimResponse:
        slot = self._slot(request.route)

        async def read(connection: Connection) -> shard_pb2.FindClaimResponse:
            return shard_pb2.FindClaimResponse(
                memory_slot=await claims.find(connection, slot, request.user_id, request.id)
            )

        return await self._read(request.route, read, deadline)

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

        return _stamped(*await self._serve(request.route, read, deadline, stamped=request.stamped))

    async def List(self, request: shard_pb2.ListRequest, deadline: Deadline) -> shard_pb2.ListResponse:
        self._check_route(request.route)
        return await self._read(request.route, lambda c: reads.list_page(c, request, self._page_bytes), deadline)

    async def ListVersions(
        self, request: shard_pb2.ListVersionsRequest, deadline: Deadline
    ) -> shard_pb2.ListVersionsResponse:
        self._slot(request.route)
        return await self._read(request.route, lambda c: reads.list_versions(c, request, self._page_bytes), deadline)

    async def Search(self, request: shard_pb2.SearchRequest, deadline: Deadline) -> shard_pb2.SearchResponse:
        self._check_route(request.route)
        self._check_dimensions(len(request.embedding))
        return _stamped(
            *await self._serve(
                request.route,
                lambda c: searching.search(c, self._identity, request, self._own_indexes),
                deadline,
                stamped=request.stamped,
            )
        )

    async def _read(self, route: shard_pb2.Route, read: Read[T], deadline: Deadline) -> T:
        answer, _ = await self._serve(route, read, deadline, stamped=False)
        return answer

    async def _serve(
        self, route: shard_pb2.Route, read: Read[T], deadline: Deadline, *, stamped: bool
    ) -> tuple[T, shard_pb2.ReadStamp | None]:
        async def checked(connection: Connection) -> T:
            try:
                return await read(connection)
            except (reads.NotServedError, NotOwnedError):
                raise await refusal(connection, self._identity, route.ranges) from None

        fresh = route.fresh if route.HasField("fresh") else None
        return await self.serve(checked, fresh, deadline, stamped=stamped)

    async def _describe(
        self, connection: Connection, owned: Sequence[tuple[int, int]] | None = None
    ) -> shard_pb2.DescribeResponse:
        """What is the same on all servers of the shard. `owned` is read unless it is given."""
        if owned is None:
            owned = await identity.read_owned(connection)
        return shard_pb2.DescribeResponse(
            cluster_id=self._identity.cluster_id,
            shard_id=self._identity.shard_id,
            epoch=await identity.read_epoch(connection),
            owned=[shard_pb2.SlotRange(first=first, last=last) for first, last in owned],
        )

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
            raise WrongShard(f"not served by {self._identity.shard_id} of cluster {self._identity.cluster_id}", epoch=0)
        if not route.ranges or any(not r.first <= r.last < SLOT_COUNT for r in route.ranges):
            raise InvalidArgument.field("route.ranges", "BAD_ROUTE", f"must be slots 0 to {SLOT_COUNT - 1}")
        if route.fresh.HasField("position") and route.fresh.position.shard_id != self._identity.shard_id:
            raise InvalidArgument.field("route.fresh.position", "BAD_ROUTE", "must be a position of this shard")

    def _check_dimensions(self, length: int) -> None:
        """None at all is an embedding that is to follow, or a search by words."""
        if length not in (0, self._identity.dimensions):
            raise InvalidArgument.field(
                "embedding", "WRONG_DIMENSION", f"has {length} numbers, not {self._identity.dimensions}"
            )


def _stamped(answer: S, stamp: shard_pb2.ReadStamp | None) -> S:
    if stamp is not None:
        answer.stamp.CopyFrom(stamp)
    return answer
