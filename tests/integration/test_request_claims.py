"""Request ids and ids of memories that are taken first, where a user has many slots: at one shard's database."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
import pytest_asyncio
from google.protobuf import timestamp_pb2

from common.errors import InvalidArgument, Unavailable
from memshard.internal.v1 import shard_pb2
from shard import claims, purge, request_claims
from shard.database import Database
from shard.purge import Retention
from tests.integration.test_everywhere import new_id
from tests.support.cluster import LocalCluster
from tests.support.wire import database, pool_of_one

if TYPE_CHECKING:
    from common.postgres import Connection

SLOT = 7  # Of shard-0, where there are three shards.
DIGEST, OTHER = b"d" * 32, b"o" * 32


@pytest_asyncio.fixture
async def shard(cluster: LocalCluster) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    async with database(cluster.shard_dsn("shard-0")) as connection:
        yield connection


async def take(shard: "Connection", user: str, digest: bytes = DIGEST, memory_slot: int = 1) -> int:
    return await request_claims.take(shard, SLOT, user, "r", digest, memory_slot)


async def test_a_request_id_is_given_back_by_the_one_attempt_that_took_it(shard: "Connection", user: str) -> None:
    assert await take(shard, user, memory_slot=1) == 1
    with pytest.raises(InvalidArgument):
        await take(shard, user, OTHER)
    await request_claims.release(shard, SLOT, user, "r", OTHER)
    with pytest.raises(InvalidArgument):
        await take(shard, user, OTHER)
    # Neither of those was an attempt of this request.
    await request_claims.release(shard, SLOT, user, "r", DIGEST)
    assert await take(shard, user, OTHER, memory_slot=2) == 2


async def test_a_request_id_that_another_attempt_has_taken_too_is_not_given_back(
    shard: "Connection", user: str
) -> None:
    """One attempt is refused; its repetition has had its effect by then."""
    assert await take(shard, user, memory_slot=1) == 1
    assert await take(shard, user, memory_slot=2) == 1
    await request_claims.release(shard, SLOT, user, "r", DIGEST)
    with pytest.raises(InvalidArgument):
        await take(shard, user, OTHER)
    assert await take(shard, user, memory_slot=2) == 1


async def test_a_request_id_is_kept_for_a_day_from_its_last_attempt(
    cluster: LocalCluster, shard: "Connection", user: str
) -> None:
    await take(shard, user)
    older = "UPDATE request_claims SET taken_at = taken_at - interval '23 hours' WHERE user_id = $1"
    await shard.execute(older, user)
    await take(shard, user)
    await shard.execute(older, user)
    retention = Retention(tombstone_s=86400.0, version_s=86400.0)
    async with pool_of_one(cluster.shard_dsn("shard-0")) as pool:
        await purge.purge(Database(pool), retention)
        with pytest.raises(InvalidArgument):
            await take(shard, user, OTHER)
        await shard.execute(older, user)
        await purge.purge(Database(pool), retention)
    await take(shard, user, OTHER)


class Meddling:
    """A connection on which an erasure of the user comes between a statement and the next, a number of times."""

    def __init__(self, connection: "Connection", user: str, *, times: int) -> None:
        self._connection = connection
        self._user = user
        self._times = times

    async def fetchval(self, statement: str, *parameters: Any) -> Any:
        answer = await self._connection.fetchval(statement, *parameters)
        await self._erase()
        return answer

    async def fetchrow(self, statement: str, *parameters: Any) -> Any:
        answer = await self._connection.fetchrow(statement, *parameters)
        await self._erase()
        return answer

    async def fetch(self, statement: str, *parameters: Any) -> Any:
        return await self._connection.fetch(statement, *parameters)

    async def _erase(self) -> None:
        if self._times:
            self._times -= 1
            await self._connection.execute("DELETE FROM claims WHERE user_id = $1", self._user)


def claim_item(user: str) -> shard_pb2.ClaimItem:
    return shard_pb2.ClaimItem(home_slot=SLOT, user_id=user, id=new_id(), digest=DIGEST, memory_slot=1)


@pytest.mark.parametrize(("erasures", "outcome"), [(0, type(None)), (1, type(None)), (99, Unavailable)])
async def test_a_claim_that_an_erasure_took_away_is_made_again(
    shard: "Connection", user: str, erasures: int, outcome: type
) -> None:
    """It is no store that comes after its expiry, which is what it was taken for."""
    late = claim_item(user)
    late.expire_time.CopyFrom(timestamp_pb2.Timestamp(seconds=1_000_000_000))
    meddling: Any = Meddling(shard, user, times=erasures)
    outcomes, _ = await claims.claim(meddling, [claim_item(user), late])
    assert [type(found) for found in outcomes] == [outcome, InvalidArgument]
    assert outcomes[1].reason == "EXPIRE_TIME_IN_PAST"  # type: ignore[union-attr]


async def test_items_of_one_batch_claim_each_for_itself(shard: "Connection", user: str) -> None:
    item, other = claim_item(user), claim_item(user)
    conflicting = shard_pb2.ClaimItem()
    conflicting.CopyFrom(item)
    conflicting.digest = OTHER
    outcomes, _ = await claims.claim(shard, [item, conflicting, other, item])
    assert [type(found).__name__ for found in outcomes] == ["NoneType", "AlreadyExists", "NoneType", "NoneType"]
