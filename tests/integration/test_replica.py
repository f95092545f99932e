"""The replica service on a real standby: it answers what it has replayed, waits for what it has not, writes nothing."""

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from common.roles import APP
from memshard.internal.v1 import shard_pb2
from tests.support.eventually import eventually
from tests.support.place import Place, at, refused
from tests.support.proxy import Proxy
from tests.support.replicated import DIMENSIONS, SHARD, Replicated, replicated
from tests.support.wire import database, reason_of

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub

# What a replica must not do: the rows are of a snapshot taken before the wait, the check is made after it.
ONE_STATEMENT = """
WITH waited AS MATERIALIZED (SELECT pg_advisory_lock(77)),
     fresh AS MATERIALIZED (SELECT pg_last_wal_replay_lsn() - '0/0' >= $1 AS enough FROM waited)
SELECT enough, (SELECT count(*) FROM memories WHERE user_id = $2) AS found FROM fresh
"""
CHECK = """
WITH waited AS MATERIALIZED (SELECT pg_advisory_lock(77))
SELECT pg_last_wal_replay_lsn() - '0/0' >= $1 FROM waited
"""
COUNT = "SELECT count(*) FROM memories WHERE user_id = $1"


@pytest_asyncio.fixture(scope="module")
async def servers() -> AsyncIterator[Replicated]:
    async with replicated("b") as running:
        yield running


@pytest_asyncio.fixture(scope="module")
async def stubs(servers: Replicated) -> "tuple[ShardServiceAsyncStub, ShardServiceAsyncStub]":
    return await servers.start_shard(), await servers.start_replica(max_lag_s=2.0)


@pytest_asyncio.fixture
async def place(
    servers: Replicated, stubs: "tuple[ShardServiceAsyncStub, ShardServiceAsyncStub]", user: str
) -> AsyncIterator[Place]:
    yield Place(servers, stubs[0], user, stubs[1])
    await servers.standby.resume_replay()


def _retry_after_s(error: grpc.aio.AioRpcError) -> float:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    retry = error_details_pb2.RetryInfo()
    assert status is not None
    assert any(detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry) for detail in status.details)
    return float(retry.retry_delay.ToTimedelta().total_seconds())


async def test_what_was_written_is_read_on_the_replica_by_its_position(place: Place) -> None:
    for number in range(5):
        position = await place.store(f"tea {number}")
        assert f"tea {number}" in await place.contents(at(position, wait_ms=5000))


async def test_a_replica_that_is_behind_says_so_and_says_when_to_try_again(place: Place) -> None:
    await place.servers.standby.pause_replay()
    position = await place.store()
    error = await refused(place.contents(at(position, wait_ms=30)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "REPLICA_BEHIND")
    assert 0 < _retry_after_s(error) < 5
    # Whatever it has is good enough for a read that does not ask for more.
    assert await place.contents(shard_pb2.Freshness()) == []


async def test_a_read_waits_while_replay_goes_on_and_then_sees_the_write(place: Place) -> None:
    await place.servers.standby.pause_replay()
    position = await place.store()
    read = asyncio.ensure_future(place.contents(at(position, wait_ms=9000)))
    done, _ = await asyncio.wait([read], timeout=0.3)
    assert not done
    await place.servers.standby.resume_replay()
    assert await read == ["tea"]


async def test_in_one_statement_the_check_passes_and_the_rows_are_old(place: Place) -> None:
    """The control: were the replica to check in the statement that reads, its answer would be old."""
    standby = place.servers.standby
    await standby.pause_replay()
    position = await place.store()
    async with (
        database(standby.dsn()) as holder,
        database(standby.dsn(APP)) as wrong,
        database(standby.dsn(APP)) as right,
    ):
        await holder.execute("SELECT pg_advisory_lock(77)")
        in_one = asyncio.ensure_future(wrong.fetchrow(ONE_STATEMENT, position.lsn, place.user))
        check = asyncio.ensure_future(right.fetchval(CHECK, position.lsn))

        async def both_wait() -> bool:
            return bool(await holder.fetchval("SELECT count(*) = 2 FROM pg_locks WHERE NOT granted"))

        await eventually(both_wait)
        await standby.resume_replay()

        async def caught_up() -> bool:
            return bool(await holder.fetchval("SELECT pg_last_wal_replay_lsn() - '0/0' >= $1", position.lsn))

        await eventually(caught_up)
        await holder.execute("SELECT pg_advisory_unlock(77)")
        # Each waiter gives the lock on when its connection ends or it is done.
        first, _ = await asyncio.wait([in_one, check], return_when=asyncio.FIRST_COMPLETED)
        await (wrong if in_one in first else right).execute("SELECT pg_advisory_unlock_all()")
        row = await in_one
        assert row is not None
        assert (row["enough"], row["found"]) == (True, 0)
        assert await check
        assert await right.fetchval(COUNT, place.user) == 1


async def test_a_bound_on_staleness_is_kept(place: Place) -> None:
    both = at(await place.store(), wait_ms=5000)
    both.max_staleness_ms = 3000
    assert await place.contents(both) == ["tea"]
    await place.servers.standby.pause_replay()

    async def too_old() -> bool:
        try:
            await place.contents(shard_pb2.Freshness(max_staleness_ms=700))
        except grpc.aio.AioRpcError as error:
            return reason_of(error) == "REPLICA_BEHIND"
        return False

    await eventually(too_old, within_s=5)
    await place.servers.standby.resume_replay()
    assert await place.contents(both) == ["tea"]


async def test_a_strong_read_and_every_write_arerefused(place: Place) -> None:
    fresh = shard_pb2.Freshness()
    requests: dict[str, Any] = {
        "List": shard_pb2.ListRequest(route=place.route(), user_id=place.user, page_size=1),
        "Get": shard_pb2.GetRequest(route=place.route(), user_id=place.user, id=str(uuid.uuid4())),
        "Store": shard_pb2.StoreRequest(route=place.route(fresh)),
        "StoreBatch": shard_pb2.StoreBatchRequest(route=place.route(fresh)),
        "Claim": shard_pb2.ClaimRequest(route=place.route(fresh)),
        "Update": shard_pb2.UpdateRequest(route=place.route(fresh)),
        "Delete": shard_pb2.DeleteRequest(route=place.route(fresh), user_id=place.user, id=str(uuid.uuid4())),
        "Erase": shard_pb2.EraseRequest(route=place.route(fresh), user_id=place.user),
        "TakeRequestId": shard_pb2.TakeRequestIdRequest(route=place.route(fresh), user_id=place.user),
        "ReleaseRequestId": shard_pb2.ReleaseRequestIdRequest(route=place.route(fresh), user_id=place.user),
    }
    served = {"List", "Get", "Search", "ListVersions", "FindClaim", "Describe", "RecyclePool"}
    every = {method.name for method in shard_pb2.DESCRIPTOR.services_by_name["ShardService"].methods}
    assert every - served == requests.keys() - served, "a new rpc: does it write?"
    for rpc, request in requests.items():
        error = await refused(getattr(place.replica, rpc)(request))
        assert (rpc, error.code(), reason_of(error)) == (rpc, grpc.StatusCode.UNAVAILABLE, "NOT_PRIMARY")


async def test_every_read_is_served(place: Place) -> None:
    position = await place.store("green tea")
    here = place.route(at(position, wait_ms=5000))
    search = shard_pb2.SearchRequest(route=here, user_id=place.user, k=5, embedding=[0.1] * DIMENSIONS)
    found = (await place.replica.Search(search)).results[0].memory
    assert found.content == "green tea"
    got = await place.replica.Get(shard_pb2.GetRequest(route=here, user_id=place.user, id=found.id))
    assert got.found[0].memory.content == "green tea"
    versions = shard_pb2.ListVersionsRequest(route=here, user_id=place.user, id=found.id, page_size=5)
    assert len((await place.replica.ListVersions(versions)).versions) == 1
    claim = await place.replica.FindClaim(shard_pb2.FindClaimRequest(route=here, user_id=place.user, id=found.id))
    assert not claim.HasField("memory_slot")


async def test_a_request_for_another_shard_isrefused(place: Place) -> None:
    elsewhere = place.route(shard_pb2.Freshness())
    elsewhere.shard_id = "shard-77"
    request = shard_pb2.ListRequest(route=elsewhere, user_id=place.user, page_size=1)
    assert reason_of(await refused(place.replica.List(request))) == "WRONG_SHARD"
    foreign = shard_pb2.ShardPosition(shard_id="shard-77", timeline=1, lsn=1)
    error = await refused(place.contents(at(foreign)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_describe_tells_how_far_both_are(place: Place) -> None:
    position = await place.store()
    primary = await place.shard.Describe(shard_pb2.DescribeRequest())
    assert primary.writable
    assert primary.position.lsn >= position.lsn
    assert (primary.lag_ms, primary.lag_bytes) == (0, 0)

    async def caught_up() -> shard_pb2.DescribeResponse | None:
        described = await place.replica.Describe(shard_pb2.DescribeRequest())
        return described if described.position.lsn >= position.lsn else None

    replica = await eventually(caught_up)
    assert replica is not None
    assert (replica.writable, replica.position.timeline) == (False, primary.position.timeline)
    assert (replica.cluster_id, list(replica.owned)) == (primary.cluster_id, list(primary.owned))
    assert replica.lag_ms < 2000
    await place.servers.standby.pause_replay()
    await place.store("x" * 1000)

    async def behind() -> bool:
        described = await place.replica.Describe(shard_pb2.DescribeRequest())
        return described.lag_bytes >= 1000 and described.lag_ms > 500

    await eventually(behind)


async def test_health_is_not_serving_when_too_far_behind_and_serving_again_after(place: Place) -> None:
    async def serving() -> bool:
        return await place.health() == health_pb2.HealthCheckResponse.SERVING

    async def not_serving() -> bool:
        return not await serving()

    await eventually(serving)
    await place.servers.standby.pause_replay()
    await eventually(not_serving, within_s=6)
    await place.servers.standby.resume_replay()
    await eventually(serving)
    # Away, and back.
    await place.servers.standby.kill()
    await eventually(not_serving)
    error = await refused(place.contents(shard_pb2.Freshness()))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    await place.servers.standby.start()
    await eventually(serving, within_s=6)
    position = await place.store()
    assert await place.contents(at(position, wait_ms=5000)) == ["tea"]


_TAKE = "LOCK TABLE memories IN ACCESS EXCLUSIVE MODE"
_WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'memories'::regclass"


async def test_a_read_that_is_in_the_way_of_replay_may_be_sent_again() -> None:
    """A recovery conflict: the primary takes away the table that the read is about to use."""
    async with replicated("b", settings={"max_standby_streaming_delay": "0"}) as servers:
        shard, replica = await servers.start_shard(), await servers.start_replica()
        place, standby = Place(servers, shard, "alice", replica), servers.standby
        await place.contents(at(await place.store(), wait_ms=5000))
        async with database(place.servers.primary.dsn()) as one, database(place.servers.primary.dsn()) as other:
            failures: set[tuple[grpc.StatusCode, str]] = set()
            stop = asyncio.Event()

            async def read() -> None:
                while not stop.is_set():
                    try:
                        await place.contents(shard_pb2.Freshness())
                    except grpc.aio.AioRpcError as error:
                        failures.add((error.code(), reason_of(error)))

            async def take_after() -> None:
                async with other.transaction():
                    await other.execute(_TAKE)

            async def reads_wait() -> bool:
                return int(await standby.fetchval(_WAITING)) > 0

            async def takes_wait() -> bool:
                return int(await one.fetchval(_WAITING)) > 0

            async def meet() -> bool:
                """Reads wait for the table; it is given back and taken again, while they begin."""
                async with asyncio.TaskGroup() as taking, one.transaction():
                    await one.execute(_TAKE)
                    await eventually(reads_wait)
                    taking.create_task(take_after())
                    await eventually(takes_wait)
                return bool(failures)

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(read())
                try:
                    await eventually(meet, within_s=60)
                finally:
                    stop.set()
        assert failures <= {(grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")}


async def test_a_promoted_standby_is_no_replica_any_more() -> None:
    async with replicated("b") as servers:
        shard, replica = await servers.start_shard(), await servers.start_replica()
        place = Place(servers, shard, "alice", replica)
        position = await place.store()
        assert await place.contents(at(position, wait_ms=5000)) == ["tea"]
        servers.send("shard", signal.SIGKILL)
        await servers.primary.kill()
        await servers.standby.promote()

        async def not_serving() -> bool:
            return await place.health() == health_pb2.HealthCheckResponse.NOT_SERVING

        await eventually(not_serving)
        assert reason_of(await refused(place.contents(at(position)))) == "REPLICA_BEHIND"


async def test_a_replica_leaves_a_promoted_standby_for_another_that_its_url_leads_to() -> None:
    """As behind a Service of all standbys: a promotion moves the name, and no connection."""
    async with (
        replicated("b", "c") as servers,
        Proxy("127.0.0.1", servers.standby.server.port) as standbys,
    ):
        other = servers.nodes["c"]
        shard = await servers.start_shard()
        dsn = servers.standby.dsn(APP).replace(servers.standby.address, standbys.address)
        replica = await servers.start_replica(database_dsn=dsn)
        place = Place(servers, shard, "alice", replica)
        position = await place.store()
        assert await place.contents(at(position, wait_ms=5000)) == ["tea"]
        async with database(other.dsn()) as connection:
            await eventually(lambda: connection.fetchval("SELECT pg_last_wal_replay_lsn() >= '0/0'::pg_lsn"))
        servers.send("shard", signal.SIGKILL)
        await servers.primary.kill()
        standbys.lead_to("127.0.0.1", other.server.port)
        await servers.standby.promote()

        async def serving_from_the_other() -> bool:
            return await place.health() == health_pb2.HealthCheckResponse.SERVING and await place.contents(
                at(position, wait_ms=1000)
            ) == ["tea"]

        await eventually(serving_from_the_other, within_s=10)


async def test_a_replica_waits_for_a_shard_that_has_not_joined_yet() -> None:
    async with replicated("b") as servers:
        starting = asyncio.ensure_future(servers.start_replica())
        done, _ = await asyncio.wait([starting], timeout=1.5)
        assert not done
        await servers.start_shard()
        described = await (await starting).Describe(shard_pb2.DescribeRequest())
        assert described.shard_id == SHARD
