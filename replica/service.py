"""ShardService on a standby: reads, once the standby has replayed what they ask for; writes are refused."""

import asyncio
from typing import NoReturn, TypeVar

from google.protobuf.message import Message

from common.config import ReplicaSettings
from common.deadline import Deadline
from common.errors import Unavailable
from memshard.internal.v1 import shard_pb2
from replica import lag
from replica.freshness import Replayed, is_fresh
from shard import identity
from shard.database import Database
from shard.identity import Identity
from shard.large_users.known import OwnIndexes
from shard.read_service import Read, ReadServicer

T = TypeVar("T")

# Between looks at a standby that is behind. Replay usually takes a few milliseconds.
_POLL_S = 0.004
# Routers ask four times a second, and going through 16,384 slots takes PostgreSQL ten milliseconds. A replica is behind
# its primary in any case; who owns what is the primary's to say.
_OWNED_TTL_S = 1.0
# Seconds after which a standby that is behind may have caught up.
_RETRY_AFTER_S = 0.1


class ReplicaServicer(ReadServicer):
    """The replica's side of memshard.internal.v1.ShardService."""

    def __init__(self, settings: ReplicaSettings, known: Identity, database: Database, own_indexes: OwnIndexes) -> None:
        super().__init__(known, settings.page_bytes, own_indexes)
        self._database = database
        self._owned: list[tuple[int, int]] | None = None
        self._owned_at = 0.0

    async def serve(
        self, read: Read[T], fresh: shard_pb2.Freshness | None, deadline: Deadline, *, stamped: bool
    ) -> tuple[T, shard_pb2.ReadStamp | None]:
        """Waits until the standby is as fresh as asked for, up to the time that the request gives it."""
        if fresh is None:
            raise _not_primary("a strong read is for the primary")
        patience = Deadline.after(min(fresh.wait_ms / 1000, deadline.remaining_s()))
        while True:
            async with self._database.reading(deadline) as connection:
                # The check is a statement of its own, before the read and on its connection: the snapshot of the read
                # is then younger than the check. Between looks others may have the connection.
                replayed = await lag.replayed(connection) if stamped or _asks(fresh) else None
                if replayed is None:
                    return await read(connection), None
                if not _asks(fresh) or is_fresh(fresh, replayed):
                    return await read(connection), _stamp(replayed)
            if not patience.remaining_s():
                raise Unavailable(
                    "this replica has not replayed what the read asks for",
                    reason="REPLICA_BEHIND",
                    retry_after_s=_RETRY_AFTER_S,
                )
            await asyncio.sleep(_POLL_S)

    async def Describe(self, request: shard_pb2.DescribeRequest, deadline: Deadline) -> shard_pb2.DescribeResponse:
        async with self._database.reading(deadline) as connection:
            replayed = await lag.replayed(connection)
            received = await lag.received(connection)
            now = asyncio.get_running_loop().time()
            if self._owned is None or now - self._owned_at > _OWNED_TTL_S:
                self._owned, self._owned_at = await identity.read_owned(connection), now
            described = await self._describe(connection, self._owned)
        described.position.CopyFrom(
            shard_pb2.ShardPosition(
                shard_id=self._identity.shard_id,
                timeline=received.timeline or replayed.timeline,
                lsn=replayed.lsn,
            )
        )
        described.lag_bytes = received.lag_bytes
        described.lag_ms = lag.in_ms(replayed.age_s)
        return described

    async def RecyclePool(
        self, request: shard_pb2.RecyclePoolRequest, deadline: Deadline
    ) -> shard_pb2.RecyclePoolResponse:
        return shard_pb2.RecyclePoolResponse(replaced=await self._database.recycle_on_request())

    async def Store(self, request: Message, deadline: Deadline) -> NoReturn:
        raise _not_primary("a replica takes no writes")

    StoreBatch = Claim = TakeRequestId = ReleaseRequestId = Update = Delete = Erase = Store


def _asks(fresh: shard_pb2.Freshness) -> bool:
    """Whether there is anything to check."""
    return fresh.HasField("position") or bool(fresh.max_staleness_ms)


def _stamp(replayed: Replayed) -> shard_pb2.ReadStamp | None:
    """What a read says of itself that begins after this look. Without a heartbeat, nobody knows of which timeline."""
    if not replayed.in_recovery or not replayed.timeline:
        return None
    return shard_pb2.ReadStamp(timeline=replayed.timeline, lsn=replayed.lsn, age_ms=lag.in_ms(replayed.age_s))


def _not_primary(why: str) -> Unavailable:
    return Unavailable(why, reason="NOT_PRIMARY", retry_after_s=_RETRY_AFTER_S)
