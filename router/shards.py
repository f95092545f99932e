"""Channels to the shards and their replicas, and one call on one of them."""

from __future__ import annotations  # The asyncio stubs exist for type checkers only.

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from common import tracing
from common.cancellation import raise_if_cancelled, requested
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import DeadlineExceeded, MemshardError, OutcomeUnknown, ReadOnly, ResourceExhausted, Unavailable
from common.limiter import Priority
from common.status import from_rpc_error
from common.telemetry.calls import CANCELLED, OK, CallsMade
from common.topology import Replica, Shard, ShardStatus, Topology
from memshard.internal.v1 import shard_pb2, shard_pb2_grpc
from router.guard import Guard, Guards, Kind
from router.levels import Levels
from router.stamps import Timelines

# Largest answer taken: 1,000 results of 64 KiB content, 32 KiB metadata and an embedding.
_MAX_ANSWER_BYTES = 128 * 1024 * 1024

# Share of the caller's time that is kept for the way back, and the most that is, in seconds.
_WAY_BACK_SHARE = 0.05
_LONGEST_WAY_BACK_S = 0.25

# Longest that calls to an address that is no shard's any more may go on.
_CLOSE_GRACE_S = 60.0

_CHANNEL_OPTIONS = [
    # With gRPC's defaults (up to 120 s) a channel comes back seconds after its server does.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    # With a fifth of jitter and the time between two looks, a server that is back is noticed within a second.
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    ("grpc.max_send_message_length", -1),
    # Otherwise a channel that is made anew (`reconnect`) shares the old one's connection, as long as that has calls.
    ("grpc.use_local_subchannel_pool", 1),
    # Retrying is decided where the budget is known, not inside the channel.
    ("grpc.enable_retries", 0),
]

SHARD_MAINTENANCE = "SHARD_MAINTENANCE"
"""The reason when a shard is not asked anything because an operator wants it so."""
NO_ANSWER = "SHARD_UNAVAILABLE"
"""The reason when a server cannot be reached, or did not answer in the time that it was given."""
# Reasons for which nothing is known of a write that was asked for.
_LEFT_IN_DOUBT = frozenset({NO_ANSWER, DeadlineExceeded.default_reason})

_SERVICE = shard_pb2.DESCRIPTOR.services_by_name["ShardService"].full_name
_HEALTH = "/grpc.health.v1.Health/Check"

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Rpc(Generic[Q, R]):
    """One rpc of ShardService, with the types of its request and answer."""

    name: str
    kind: Kind
    priority: Priority = Priority.INTERACTIVE

    @property
    def writes(self) -> bool:
        """Whether it changes anything."""
        return self.kind is Kind.STORE


STORE: Rpc[shard_pb2.StoreRequest, shard_pb2.StoreResponse] = Rpc("Store", Kind.STORE)
DELETE: Rpc[shard_pb2.DeleteRequest, shard_pb2.DeleteResponse] = Rpc("Delete", Kind.STORE)
STORE_BATCH: Rpc[shard_pb2.StoreBatchRequest, shard_pb2.StoreBatchResponse] = Rpc(
    "StoreBatch", Kind.STORE, Priority.BATCH
)
CLAIM: Rpc[shard_pb2.ClaimRequest, shard_pb2.ClaimResponse] = Rpc("Claim", Kind.STORE)
TAKE_REQUEST_ID: Rpc[shard_pb2.TakeRequestIdRequest, shard_pb2.TakeRequestIdResponse] = Rpc("TakeRequestId", Kind.STORE)
RELEASE_REQUEST_ID: Rpc[shard_pb2.ReleaseRequestIdRequest, shard_pb2.ReleaseRequestIdResponse] = Rpc(
    "ReleaseRequestId", Kind.STORE
)
UPDATE: Rpc[shard_pb2.UpdateRequest, shard_pb2.UpdateResponse] = Rpc("Update", Kind.STORE)
ERASE: Rpc[shard_pb2.EraseRequest, shard_pb2.EraseResponse] = Rpc("Erase", Kind.STORE, Priority.BATCH)
FIND_CLAIM: Rpc[shard_pb2.FindClaimRequest, shard_pb2.FindClaimResponse] = Rpc("FindClaim", Kind.RETRIEVE)
LIST_VERSIONS: Rpc[shard_pb2.ListVersionsRequest, shard_pb2.ListVersionsResponse] = Rpc("ListVersions", Kind.RETRIEVE)
GET: Rpc[shard_pb2.GetRequest, shard_pb2.GetResponse] = Rpc("Get", Kind.RETRIEVE)
LIST: Rpc[shard_pb2.ListRequest, shard_pb2.ListResponse] = Rpc("List", Kind.RETRIEVE)
SEARCH: Rpc[shard_pb2.SearchRequest, shard_pb2.SearchResponse] = Rpc("Search", Kind.SEARCH)
DESCRIBE: Rpc[shard_pb2.DescribeRequest, shard_pb2.DescribeResponse] = Rpc("Describe", Kind.RETRIEVE)
RECYCLE_POOL: Rpc[shard_pb2.RecyclePoolRequest, shard_pb2.RecyclePoolResponse] = Rpc("RecyclePool", Kind.STORE)


class Shards:
    """Calls to shards and replicas by name: one channel for each address, one guard for each server."""

    def __init__(self, settings: RouterSettings) -> None:
        self.guards = Guards()
        self.levels = Levels(self.guards)
        self.timelines = Timelines()
        """How far each shard has come, for whatever remembers what it said before."""
        self._calls = CallsMade(_SERVICE)
        self._margin_s = settings.shard_deadline_margin_s
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._stubs: dict[str, shard_pb2_grpc.ShardServiceAsyncStub] = {}
        self._in_flight: dict[str, set[grpc.aio.UnaryUnaryCall[Any, Any]]] = {}

    async def call(self, shard: Shard, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> R:
        """The answer of `shard` to one rpc of ShardService.

        Raises ReadOnly or Unavailable when the shard's status says so; the shard's own domain error; Unavailable when
        it cannot be reached or its breaker is open, ResourceExhausted when it has too much to do, OutcomeUnknown when a
        write is left in doubt; DeadlineExceeded.
        """
        self.admit(shard, rpc)
        return await self._call(shard, rpc, request, deadline)

    async def probe(self, shard: Shard, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> R:
        """The same, whatever the shard's degradation level refuses. Raises like `call`."""
        self._admit_by_status(shard, rpc)
        return await self._call(shard, rpc, request, deadline)

    async def call_replica(self, shard: Shard, replica: Replica, rpc: Rpc[Q, R], request: Q, *, timeout_s: float) -> R:
        """The answer of one of the shard's replicas, within `timeout_s`. Raises like `call`."""
        guard = self.guards.of(shard.shard_id, replica.replica_id)
        return await self._guarded(guard, replica.address, rpc, request, timeout_s)

    async def describe(
        self, address: str, name: str, *, timeout_s: float, without_owned: bool = False
    ) -> shard_pb2.DescribeResponse:
        """What a server says of itself. It is asked whatever its breakers say: this is how they hear that it is back.

        Raises Unavailable, DeadlineExceeded.
        """
        request = shard_pb2.DescribeRequest(without_owned=without_owned)
        return await self._ask(address, name, DESCRIBE, request, timeout_s)

    async def recycle_pool(self, address: str, name: str, *, timeout_s: float) -> int:
        """Has a server replace its connections to its database; how many there were. Asked as in `describe`."""
        return (await self._ask(address, name, RECYCLE_POOL, shard_pb2.RecyclePoolRequest(), timeout_s)).replaced

    def reconnect(self, address: str) -> bool:
        """Has the next call make a new connection. What is in flight on the old one has a minute to end.

        Returns whether there was one.
        """
        if address not in self._channels:
            return False
        self._retire(address)
        return True

    async def is_serving(self, address: str, *, timeout_s: float) -> bool:
        """Whether a server's health check says that it serves. Raises DeadlineExceeded when it says nothing in time."""
        check = self.channel(address).unary_unary(
            _HEALTH,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            health = await check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded("no answer to a health check") from error
            return False
        return health.status == health_pb2.HealthCheckResponse.SERVING

    def admit(self, shard: Shard, rpc: Rpc[Any, Any]) -> None:
        """Whether the shard may be asked this now. A draining one serves on: its slots are on their way, not gone.

        Raises Unavailable / SHARD_MAINTENANCE, ReadOnly.
        """
        self._admit_by_status(shard, rpc)
        if rpc.writes and not self.levels.effects(shard.shard_id).allow_writes:
            raise ReadOnly(f"{shard.shard_id} takes no writes at its degradation level")

    def channel(self, address: str) -> grpc.aio.Channel:
        """The channel to an address, which is closed when nobody in the topology has that any more."""
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        return self._channels[address]

    @property
    def channel_count(self) -> int:
        """How many channels are open."""
        return len(self._channels)

    def outstanding(self, address: str) -> int:
        """How many calls the server at an address has not answered yet."""
        return len(self._in_flight.get(address, ()))

    def abandon(self, address: str) -> None:
        """Ends what is in flight to an address: whoever waits for it hears that nobody answers there."""
        for call in tuple(self._in_flight.get(address, ())):
            call.cancel()

    def follow(self, topology: Topology) -> None:
        """Closes the channels to addresses that nobody has any more, once what is in flight on them has ended."""
        current = {shard.address for shard in topology.shards}
        current |= {replica.address for shard in topology.shards for replica in shard.replicas}
        self.guards.keep(
            {(shard.shard_id, None) for shard in topology.shards}
            | {(shard.shard_id, replica.replica_id) for shard in topology.shards for replica in shard.replicas}
        )
        for address in self._channels.keys() - current:
            self._retire(address)

    async def close(self) -> None:
        """Closes all channels."""
        self._stubs.clear()
        channels, self._channels = self._channels, {}
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(
            *self._closing, *(channel.close() for channel in channels.values()), return_exceptions=True
        )

    def _admit_by_status(self, shard: Shard, rpc: Rpc[Any, Any]) -> None:
        if shard.status is ShardStatus.MAINTENANCE:
            raise Unavailable(f"{shard.shard_id} is in maintenance", reason=SHARD_MAINTENANCE)
        if rpc.writes and shard.status is ShardStatus.READONLY:
            raise ReadOnly(f"{shard.shard_id} takes no writes for the time being")

    async def _call(self, shard: Shard, rpc: Rpc[Q, R], request: Q, deadline: Deadline) -> R:
        remaining_s = self._for_next_hop(deadline.remaining_s())
        if remaining_s <= 0:
            raise DeadlineExceeded(f"no time left to ask {shard.shard_id}")
        return await self._guarded(self.guards.of(shard.shard_id), shard.address, rpc, request, remaining_s)

    def _retire(self, address: str) -> None:
        self._stubs.pop(address, None)
        closing = asyncio.create_task(self._channels.pop(address).close(grace=_CLOSE_GRACE_S))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _guarded(self, guard: Guard, address: str, rpc: Rpc[Q, R], request: Q, timeout_s: float) -> R:
        wide = not rpc.writes and _is_wide(request)
        call = f"{rpc.name}All" if wide else rpc.name
        try:
            began = time.monotonic()
            await guard.room(rpc.kind, rpc.priority)
            timeout_s -= time.monotonic() - began
            if timeout_s <= 0:
                raise guard.limiter.refusal(rpc.priority)
            with (
                tracing.span(f"{_SERVICE}/{rpc.name}", guard.attributes, tracing.Kind.CLIENT),
                guard.passing(rpc.kind, call, rpc.priority, _slot(request), wide=wide),
            ):
                return await self._ask(address, guard.name, rpc, request, timeout_s)
        except (DeadlineExceeded, Unavailable) as error:
            if rpc.writes and error.reason in _LEFT_IN_DOUBT:
                raise _in_doubt(error) from error
            raise

    async def _ask(self, address: str, name: str, rpc: Rpc[Q, R], request: Q, timeout_s: float) -> R:
        call: grpc.aio.UnaryUnaryCall[Q, R] = getattr(self._stub(address), rpc.name)(
            request, timeout=timeout_s, metadata=tracing.outgoing()
        )
        in_flight = self._in_flight.setdefault(address, set())
        in_flight.add(call)
        cancellations = requested()
        began, status = time.perf_counter(), CANCELLED
        try:
            answer = await call
            status = OK
        except grpc.aio.AioRpcError as error:
            status = error.code().name
            raise_if_cancelled(since=cancellations)
            raise _explained(error, name) from error
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # Nobody cancelled the caller: the call was abandoned, or gRPC ended it with its channel.
            raise _gone(name) from error
        finally:
            self._calls.ended(rpc.name, status, time.perf_counter() - began)
            in_flight.discard(call)
            if not in_flight:
                self._in_flight.pop(address, None)
        raise_if_cancelled(since=cancellations)
        return answer

    def _for_next_hop(self, remaining_s: float) -> float:
        """What a shard may use of the caller's time. The rest is for the way back: the more of it, the more there is,
        so that who gives a second hears what some shards said though the machine is busy."""
        way_back_s = max(self._margin_s, min(_WAY_BACK_SHARE * remaining_s, _LONGEST_WAY_BACK_S))
        return remaining_s - way_back_s

    def _stub(self, address: str) -> shard_pb2_grpc.ShardServiceAsyncStub:
        stub = self._stubs.get(address)
        if stub is None:
            stub = self._stubs[address] = shard_pb2_grpc.ShardServiceStub(self.channel(address))
        return stub


def _slot(request: Message) -> int | None:
    """The one slot that a request is about; None when it is about more."""
    ranges = getattr(request, "route", shard_pb2.Route()).ranges
    return ranges[0].first if len(ranges) == 1 and ranges[0].first == ranges[0].last else None


def _is_wide(request: Message) -> bool:
    """Whether a read is about all users, and so takes as long as there is data rather than as one user's does."""
    return _slot(request) is None and not getattr(request, "user_id", "")


def _explained(error: grpc.aio.AioRpcError, name: str) -> MemshardError:
    """A failed call in words that an agent may see: the shard's name, never its address."""
    domain_error = from_rpc_error(error)
    if isinstance(domain_error, DeadlineExceeded) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{name} did not answer in time")
    if domain_error is not None:
        return domain_error
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhausted(f"the answer of {name} is too large; ask for fewer results", reason="ANSWER_TOO_LARGE")
    return _gone(name)


def _in_doubt(error: MemshardError) -> OutcomeUnknown:
    """What became of a write that was asked for, and whose answer did not come."""
    return OutcomeUnknown(f"{error.message}; the same request again settles whether the write happened")


def _gone(name: str) -> Unavailable:
    """The server cannot be reached, or went away before it answered."""
    return Unavailable(f"{name} does not answer", reason=NO_ANSWER)
