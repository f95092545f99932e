"""The shard's service follows whichever server takes writes, waits for one, and never goes back to an older."""

import asyncio
import signal
from collections.abc import AsyncIterator

import grpc
import pytest_asyncio
from grpc_health.v1 import health_pb2
from pydantic import SecretStr

from common.config import ShardSettings
from common.deadline import Deadline
from common.roles import APP
from memshard.internal.v1 import shard_pb2
from shard.database import Database, open_pool
from shard.primary import Newest, Primary, timeline_of
from tests.support.eventually import eventually
from tests.support.place import Place, at, refused
from tests.support.replicated import SHARD, Node, Replicated, replicated
from tests.support.wire import database, reason_of

COUNT = "SELECT count(*) FROM memories WHERE content = $1"


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[Replicated]:
    async with replicated("b") as running:
        yield running


async def _holds(node: Node, content: str) -> int:
    async with database(node.dsn(APP)) as connection:
        count: int = await connection.fetchval(COUNT, content)
    return count


async def _caught_up(servers: Replicated) -> None:
    async def replayed() -> bool:
        return bool(
            await servers.primary.fetchval(
                "SELECT bool_and(replay_lsn >= pg_current_wal_flush_lsn()) FROM pg_stat_replication"
            )
        )

    await eventually(replayed)


async def test_a_write_waits_for_a_promotion_and_an_old_primary_that_comes_back_is_left_alone(
    servers: Replicated,
) -> None:
    place = Place(servers, await servers.start_shard())
    before = await place.store("before")
    await _caught_up(servers)
    await servers.primary.kill()
    write = asyncio.ensure_future(place.store("meanwhile"))
    done, _ = await asyncio.wait([write], timeout=0.5)
    assert not done
    await servers.standby.promote()
    after = await write
    assert (before.timeline, after.timeline) == (1, 2)
    assert await _holds(servers.standby, "meanwhile") == 1
    # Back, first in the URL, and ready to take writes.
    await servers.primary.start()
    for number in range(10):
        assert (await place.store(f"later {number}")).timeline == 2
    assert await _holds(servers.primary, "later 0") == 0
    # A service that starts now chooses the newer one too.
    await servers.stop("shard")
    again = Place(servers, await servers.start_shard())
    assert (await again.store("much later")).timeline == 2
    assert await _holds(servers.primary, "much later") == 0
    assert (await again.contents(None, again.shard))[:2] == ["much later", "later 9"]


async def test_what_is_under_way_on_an_old_primary_is_in_doubt_once_it_has_a_successor(servers: Replicated) -> None:
    place = Place(servers, await servers.start_shard())
    await place.store("before")
    await servers.primary.set_sync_names('ANY 1 ("nobody")')
    await _caught_up(servers)
    stuck = asyncio.ensure_future(place.store("stuck"))

    async def waits() -> bool:
        return bool(
            await servers.primary.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        )

    await eventually(waits)
    assert servers.standby.link is not None
    servers.standby.link.refuse()
    await servers.standby.promote()
    error = await refused(stuck)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
    assert (await place.store("after")).timeline == 2


async def test_a_server_that_turns_read_only_is_not_written_to_and_the_service_stays(servers: Replicated) -> None:
    place = Place(servers, await servers.start_shard(primary_wait_s=0.5))
    await place.store("before")

    async def health() -> int:
        return await place.health("shard")

    await servers.primary.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    await servers.primary.execute("SELECT pg_reload_conf()")

    async def not_serving() -> bool:
        return await health() == health_pb2.HealthCheckResponse.NOT_SERVING

    await eventually(not_serving)
    for call in (place.store("meanwhile"), place.contents(None, place.shard)):
        error = await refused(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    await servers.primary.execute("ALTER SYSTEM RESET default_transaction_read_only")
    await servers.primary.execute("SELECT pg_reload_conf()")
    await eventually(lambda: place.store("after"), within_s=5)

    async def serving() -> bool:
        return await health() == health_pb2.HealthCheckResponse.SERVING

    await eventually(serving)


async def test_with_no_server_left_callers_are_told_so_in_time(servers: Replicated) -> None:
    place = Place(servers, await servers.start_shard(primary_wait_s=0.5))
    await place.store("before")
    await servers.primary.kill()
    error = await refused(place.store("meanwhile", timeout_s=5))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    error = await refused(place.contents(None, place.shard))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    # Not even half a second: the caller's own time is shorter.
    error = await refused(place.store("meanwhile", timeout_s=0.3))
    assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    await servers.primary.start()
    await eventually(lambda: place.store("after"), within_s=5)


async def test_a_shard_that_starts_waits_for_a_server_that_takes_writes(servers: Replicated) -> None:
    await servers.start_shard()
    await servers.stop("shard", signal.SIGKILL)
    await _caught_up(servers)
    await servers.primary.kill()
    starting = asyncio.ensure_future(servers.start_shard())
    done, _ = await asyncio.wait([starting], timeout=1.5)
    assert not done
    await servers.standby.promote()
    described = await (await starting).Describe(shard_pb2.DescribeRequest())
    assert (described.writable, described.position.timeline) == (True, 2)


async def test_a_token_of_a_newer_timeline_is_not_satisfied_by_an_older_primary(servers: Replicated) -> None:
    place = Place(servers, await servers.start_shard())
    position = await place.store("before")
    assert await place.contents(at(position), place.shard) == ["before"]
    newer = shard_pb2.ShardPosition(shard_id=SHARD, timeline=position.timeline + 1, lsn=1)
    error = await refused(place.contents(at(newer), place.shard))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "REPLICA_BEHIND")


async def test_a_connection_that_died_in_use_does_not_stop_the_search_for_a_primary(servers: Replicated) -> None:
    dsn = SecretStr(servers.primary.dsn(APP))
    settings = ShardSettings(shard_id=SHARD, catalog_dsn=dsn, database_dsn=dsn, embedder="none")
    newest = Newest()
    primary = Primary(dsn.get_secret_value(), newest)
    following = asyncio.create_task(primary.run())
    try:
        await primary.available(10)
        async with await open_pool(settings, "test", primary) as pool:
            async with Database(pool, primary).reading(Deadline.after(30)) as connection:
                await servers.primary.fetchval("SELECT pg_terminate_backend($1)", connection.get_server_pid())
                # The pool takes it back by itself, and nobody can speak of it any more.
                await eventually(lambda: timeline_of(connection) == 0)
                newest.timeline += 1
                await eventually(lambda: not primary.is_available)
            assert not following.done()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
