"""ShardService: each method checks where the request was meant to go, then reads or writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.rpc import status_pb2

from common import logs
from common.config import ShardSettings
from common.deadline import Deadline
from common.errors import MemshardError, Unavailable, WrongShard
from common.gathering import Gathering
from common.machine import Watch
from common.postgres import Connection
from common.status import to_status
from common.telemetry.registry import STORES_GATHERED
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import changes, claims, erase, erasures, reads, request_claims, store
from shard.database import Database
from shard.disk import Disk
from shard.durability import Durability
from shard.embedding_queue import EmbeddingQueue
from shard.identity import Identity
from shard.large_users.keeper import Keeper
from shard.ownership import NotOwnedError
from shard.position import read_position
from shard.primary import timeline_of
from shard.read_service import Read, ReadServicer
from shard.refusal import refusal
from shard.replayed import standbys_behind
from shard.writes import Write, Writes

T = TypeVar("T")
W = TypeVar(
    "W",
    shard_pb2.StoreResponse,
    shard_pb2.StoreBatchResponse,
    shard_pb2.ClaimResponse,
    shard_pb2.TakeRequestIdResponse,
    shard_pb2.UpdateResponse,
    shard_pb2.EraseResponse,
    shard_pb2.DeleteResponse,
)

_log = logs.get_logger("service")

_RETRY_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Host:
    """What the service runs on, and its database keeps its data on."""

    disk: Disk
    machine: Watch


class ShardServicer(ReadServicer):
    """The shard's side of memshard.internal.v1.ShardService."""

    def __init__(
        self,
        settings: ShardSettings,
        known: Identity,
        database: Database,
        writes: Writes,
        durability: Durability,
        queue: EmbeddingQueue,
        host: Host,
        keeper: Keeper,
    ) -> None:
        super().__init__(known, settings.page_bytes, keeper.known)
        self._keeper = keeper
        self._database = database
        self._durability = durability
        self._writes = writes
        self._queue = queue
        self._host = host
        self._stores = Gathering("store together", self._store_alone, self._store_together)

    async def Store(self, request: shard_pb2.StoreRequest, deadline: Deadline) -> shard_pb2.StoreResponse:
        self._slot(request.route)
        self._check_embedding(request.memory)
        return await self._stores.serve(request, deadline)

    async def _store_alone(self, request: shard_pb2.StoreRequest, deadline: Deadline) -> shard_pb2.StoreResponse:
        STORES_GATHERED.observe(1)

        async def write(connection: Connection) -> tuple[shard_pb2.StoreResponse, bool]:
            slot = request.route.ranges[0].first
            stored = await store.store(connection, self._identity, slot, request.memory, request.digest)
            if not request.memory.embedding:
                self._queue.wake()
            return shard_pb2.StoreResponse(memory=stored.memory, deleted=stored.deleted), stored.repeated

        return await self._receipted(write, request.route, deadline)

    async def _store_together(
        self, requests: Sequence[shard_pb2.StoreRequest], deadline: Deadline
    ) -> list[shard_pb2.StoreResponse | None]:
        """What of several requests can be stored in one statement, with one commit; None for each of the others."""
        items = [
            shard_pb2.StoreItem(slot=request.route.ranges[0].first, memory=request.memory, digest=request.digest)
            for request in requests
        ]
        STORES_GATHERED.observe(len(items))

        async def write(connection: Connection) -> tuple[list[store.Stored | None], bool]:
            stored = await store.store_together(connection, self._identity, items)
            if not all(item.memory.embedding for item in items):
                self._queue.wake()
            return stored, False

        stored, commit = await self._writes.run(write, deadline, acknowledges=_stored)
        return [one and shard_pb2.StoreResponse(memory=one.memory, commit=commit) for one in stored]

    async def StoreBatch(
        self, request: shard_pb2.StoreBatchRequest, deadline: Deadline
    ) -> shard_pb2.StoreBatchResponse:
        self._check_route(request.route)
        for item in request.items:
            self._check_embedding(item.memory)

        async def write(connection: Connection) -> tuple[shard_pb2.StoreBatchResponse, bool]:
            outcomes, repeated = await store.store_many(connection, self._identity, request.items)
            refused = await self._refusal_if_needed(connection, request.route, outcomes)
            self._queue.wake()
            response = shard_pb2.StoreBatchResponse(
                outcomes=[
                    shard_pb2.StoreOutcome(deleted=True)
                    if isinstance(outcome, store.Deleted)
                    else shard_pb2.StoreOutcome(error=_item_error(outcome, refused))
                    for outcome in outcomes
                ]
            )
            return response, repeated

        return await self._receipted(write, request.route, deadline)

    async def Claim(self, request: shard_pb2.ClaimRequest, deadline: Deadline) -> shard_pb2.ClaimResponse:
        self._check_route(request.route)

        async def write(connection: Connection) -> tuple[shard_pb2.ClaimResponse, bool]:
            outcomes, repeated = await claims.claim(connection, request.items)
            refused = await self._refusal_if_needed(connection, request.route, outcomes)
            response = shard_pb2.ClaimResponse(
                outcomes=[shard_pb2.ClaimOutcome(error=_item_error(outcome, refused)) for outcome in outcomes]
            )
            return response, repeated

        return await self._receipted(write, request.route, deadline)

    async def TakeRequestId(
        self, request: shard_pb2.TakeRequestIdRequest, deadline: Deadline
    ) -> shard_pb2.TakeRequestIdResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> tuple[shard_pb2.TakeRequestIdResponse, bool]:
            memory_slot = await request_claims.take(
                connection, slot, request.user_id, request.request_id, request.digest, request.memory_slot
            )
            # Never a mere repetition: every attempt is counted, by a commit of its own.
            return shard_pb2.TakeRequestIdResponse(memory_slot=memory_slot), False

        return await self._receipted(write, request.route, deadline)

    async def ReleaseRequestId(
        self, request: shard_pb2.ReleaseRequestIdRequest, deadline: Deadline
    ) -> shard_pb2.ReleaseRequestIdResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> tuple[shard_pb2.ReleaseRequestIdResponse, bool]:
            released = await request_claims.release(
                connection, slot, request.user_id, request.request_id, request.digest
            )
            return shard_pb2.ReleaseRequestIdResponse(), not released

        response, _ = await self._write(write, request.route, deadline)
        return response

    async def Update(self, request: shard_pb2.UpdateRequest, deadline: Deadline) -> shard_pb2.UpdateResponse:
        slot = self._slot(request.route)
        self._check_embedding(request.memory)

        async def write(connection: Connection) -> tuple[shard_pb2.UpdateResponse, bool]:
            memory, repeated = await changes.update(connection, self._identity, slot, request)
            if memory.embedding_state == pb.EMBEDDING_STATE_PENDING:
                self._queue.wake()
            return shard_pb2.UpdateResponse(memory=memory), repeated

        return await self._receipted(write, request.route, deadline)

    async def Erase(self, request: shard_pb2.EraseRequest, deadline: Deadline) -> shard_pb2.EraseResponse:
        if request.part in (shard_pb2.ERASE_PART_FIND, shard_pb2.ERASE_PART_RECORD):
            return await self._known_erasure(request, deadline)
        self._check_route(request.route)
        ranges = request.route.ranges
        bounds = [asked.first for asked in ranges], [asked.last for asked in ranges]

        async def write(connection: Connection) -> tuple[shard_pb2.EraseResponse, bool]:
            erased = await erase.erase(
                connection,
                bounds,
                reads.slot_count(ranges),
                request.user_id,
                request.request_id,
                part=request.part,
                forgotten=request.forgotten,
            )
            response = shard_pb2.EraseResponse(
                memories_erased=erased.memories, versions_erased=erased.versions, ids=sorted(erased.ids)
            )
            return response, erased.repeated

        response = await self._receipted(write, request.route, deadline)
        self._keeper.erased(request.user_id)
        # Of a repeated request as well: the first may have ended before they had.
        response.unconfirmed.extend(await standbys_behind(self._database, response.commit.lsn, deadline))
        return response

    async def _known_erasure(self, request: shard_pb2.EraseRequest, deadline: Deadline) -> shard_pb2.EraseResponse:
        """Whether a request to erase is over, or from now on."""
        slot = self._slot(request.route)

        async def write(connection: Connection) -> tuple[shard_pb2.EraseResponse, bool]:
            if request.part == shard_pb2.ERASE_PART_RECORD:
                totals = request.memories_erased, request.versions_erased
                known: erase.Erased | None = await erasures.record(connection, slot, request.request_id, *totals)
            else:
                known = await erasures.find(connection, slot, request.request_id)
            if known is None:
                return shard_pb2.EraseResponse(), False
            response = shard_pb2.EraseResponse(
                over=True, memories_erased=known.memories, versions_erased=known.versions
            )
            return response, known.repeated

        return await self._receipted(write, request.route, deadline)

    async def Delete(self, request: shard_pb2.DeleteRequest, deadline: Deadline) -> shard_pb2.DeleteResponse:
        slot = self._slot(request.route)

        async def write(connection: Connection) -> tuple[shard_pb2.DeleteResponse, bool]:
            deleted, repeated = await changes.delete(connection, slot, request.user_id, request.id, request.request_id)
            return shard_pb2.DeleteResponse(deleted=deleted), repeated

        return await self._receipted(write, request.route, deadline)

    async def Describe(self, request: shard_pb2.DescribeRequest, deadline: Deadline) -> shard_pb2.DescribeResponse:
        pool_size, pool_in_use = self._database.use()
        try:
            described = await self._of_the_database(request, deadline)
        except (Unavailable, TimeoutError):
            # A database that is away has no connections, let alone all of them in use.
            if not (request.without_owned and self._database.is_full):
                raise
            # Whoever watches the pool is to hear that it is full, and more so than at any other time.
            described = self._silent()
            pool_size, pool_in_use = self._database.use()
        described.pool_size, described.pool_in_use = pool_size, pool_in_use
        room, busy = self._host.disk.room, self._host.machine.busy
        described.disk_bytes, described.disk_free_bytes = room.size_bytes, room.free_bytes
        described.cpu, described.memory = busy.cpu, busy.memory
        return described

    async def _of_the_database(
        self, request: shard_pb2.DescribeRequest, deadline: Deadline
    ) -> shard_pb2.DescribeResponse:
        # Half of the time may pass until there is a connection: the other half is to say that there is none.
        patience = Deadline.after(deadline.remaining_s() / 2) if request.without_owned else deadline
        async with self._database.reading(patience) as connection:
            described = await self._describe(connection, () if request.without_owned else None)
            here = await read_position(connection)
        described.writable = True
        described.position.CopyFrom(
            shard_pb2.ShardPosition(shard_id=self._identity.shard_id, timeline=here.timeline, lsn=here.lsn)
        )
        described.durability = self._durability.of_commit(self._durability.begin(), here)
        described.sync_set.extend(sorted(self._durability.members))
        return described

    def _silent(self) -> shard_pb2.DescribeResponse:
        """What there is to say without the database."""
        return shard_pb2.DescribeResponse(
            cluster_id=self._identity.cluster_id,
            shard_id=self._identity.shard_id,
            database_silent_ms=max(1, round(self._database.silent_s * 1000)),
        )

    async def RecyclePool(
        self, request: shard_pb2.RecyclePoolRequest, deadline: Deadline
    ) -> shard_pb2.RecyclePoolResponse:
        replaced = await self._database.recycle_on_request()
        _log.warning("connections are replaced", count=replaced)
        return shard_pb2.RecyclePoolResponse(replaced=replaced)

    async def serve(
        self, read: Read[T], fresh: shard_pb2.Freshness | None, deadline: Deadline, *, stamped: bool
    ) -> tuple[T, shard_pb2.ReadStamp | None]:
        """The primary is as fresh as can be, unless it has a successor that it does not know of."""
        async with self._database.reading(deadline) as connection:
            self._durability.require_primary(timeline_of(connection))
            if fresh is not None and fresh.position.timeline > timeline_of(connection):
                raise Unavailable(
                    "another server has taken the writes over", reason="REPLICA_BEHIND", retry_after_s=_RETRY_AFTER_S
                )
            # Before the read begins, or it would say of itself what only others after it can.
            stamp = self._writes.seen.stamp(timeline_of(connection)) if stamped else None
            return await read(connection), stamp

    async def _receipted(self, write: Write[W], route: shard_pb2.Route, deadline: Deadline) -> W:
        """What a write answers, with the commit in it."""
        response, commit = await self._write(write, route, deadline)
        response.commit.CopyFrom(commit)
        return response

    async def _write(self, write: Write[T], route: shard_pb2.Route, deadline: Deadline) -> tuple[T, shard_pb2.Commit]:
        async def checked(connection: Connection) -> tuple[T, bool]:
            try:
                return await write(connection)
            except NotOwnedError:
                raise await refusal(connection, self._identity, route.ranges) from None

        return await self._writes.run(checked, deadline)

    def _check_embedding(self, memory: pb.Memory) -> None:
        self._check_dimensions(len(memory.embedding))

    async def _refusal_if_needed(
        self, connection: Connection, route: shard_pb2.Route, outcomes: Sequence[object]
    ) -> WrongShard | None:
        """What an item of many is told that is not this shard's, if there is one."""
        if not any(isinstance(outcome, NotOwnedError) for outcome in outcomes):
            return None
        return await refusal(connection, self._identity, route.ranges)


def _stored(outcomes: Sequence[store.Stored | None]) -> int:
    return sum(outcome is not None for outcome in outcomes)


def _item_error(outcome: MemshardError | NotOwnedError | None, refused: WrongShard | None) -> status_pb2.Status | None:
    """What became of one item of many, as it travels; None for a success."""
    if isinstance(outcome, NotOwnedError):
        assert refused is not None
        return to_status(refused)
    return None if outcome is None else to_status(outcome)
