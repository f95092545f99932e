"""The caller's time reaches the database: what nobody waits for any more is ended there."""

import asyncio
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest

from common.deadline import Deadline
from common.errors import InvalidArgument, OutcomeUnknown
from common.postgres import Connection
from memshard.v1 import memory_pb2 as pb
from shard.database import Database
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.proxies import Proxies
from tests.support.proxy import Fault
from tests.support.wire import database, pool_of_one, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@pytest.mark.parametrize(("remaining_s", "timeout"), [(0.3, "1s"), (5, "10s"), (10, "10s"), (25, "30s")])
async def test_a_statement_may_take_about_as_long_as_its_caller_waits(
    cluster: LocalCluster, remaining_s: float, timeout: str
) -> None:
    async with pool_of_one(cluster.shard_dsn("shard-0")) as pool:
        here = Database(pool)
        for _ in range(2):
            # On one connection, whatever it was used for before.
            async with here.reading(Deadline.after(60)) as connection:
                assert await connection.fetchval("SHOW statement_timeout") == "30s"
            async with here.reading(Deadline.after(remaining_s)) as connection:
                assert await connection.fetchval("SHOW statement_timeout") == timeout


async def test_the_server_ends_a_read_and_a_write_by_itself(cluster: LocalCluster) -> None:
    """Which is their time that is up, and no database that is away, which would open its breaker for all."""
    async with pool_of_one(cluster.shard_dsn("shard-0")) as pool:
        here = Database(pool)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with here.reading(Deadline.after(0.5)) as connection:
                await connection.execute("SELECT pg_sleep(20)")
        with pytest.raises(TimeoutError):
            async with (await here.to_write(Deadline.after(0.5))).entered() as connection:
                await connection.execute("SELECT pg_sleep(20)")
        assert time.monotonic() - began < 10


async def test_a_read_whose_caller_has_left_ends_in_the_database(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    """It waits for a lock that the test holds, and is gone long before that is given back."""
    await api.StoreMemory(store_request(user, "there"))
    shard = (await topology_of(cluster.catalog_dsn())).owner(user_slot(user))
    async with (
        database(cluster.shard_dsn(shard.shard_id, owner=True)) as holder,
        database(cluster.shard_dsn(shard.shard_id, owner=True)) as watcher,
        holder.transaction(),
    ):
        await holder.execute("LOCK TABLE memories IN ACCESS EXCLUSIVE MODE")
        listing = api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=30)

        async def waiting() -> int:
            # The listing, and not what the shard does of its own accord, which waits as well.
            count: int = await watcher.fetchval(
                """
                SELECT count(*) FROM pg_stat_activity
                WHERE wait_event_type = 'Lock' AND query LIKE '%ORDER BY create_time DESC, id DESC LIMIT%'
                    AND pid <> pg_backend_pid()
                """
            )
            return count

        await eventually(waiting, within_s=5)
        listing.cancel()

        async def gone() -> bool:
            return await waiting() == 0

        # Sooner than a router gives an attempt up of its own accord.
        await eventually(gone)
    assert (await api.ListMemories(pb.ListMemoriesRequest(user_id=user))).memories


async def test_a_write_whose_connection_is_ended_is_in_doubt(cluster: LocalCluster) -> None:
    """As when the server at the other end has a successor."""
    async with pool_of_one(cluster.shard_dsn("shard-0")) as pool:
        with pytest.raises(OutcomeUnknown):
            async with (await Database(pool).to_write(Deadline.after(5))).entered() as connection:
                await ended_while_it_waits(connection)
        async with Database(pool).reading(Deadline.after(5)) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def ended_while_it_waits(connection: Connection) -> None:
    """Ends a connection from under a statement that waits on it."""
    statement = asyncio.create_task(connection.execute("SELECT pg_sleep(5)"))
    await asyncio.sleep(0)
    connection.terminate()
    await statement


async def test_a_use_that_ended_midway_leaves_no_transaction_open(cluster: LocalCluster) -> None:
    """A value that the client cannot encode: the statement is prepared by then, and the server waits for the rest."""
    async with (
        pool_of_one(cluster.shard_dsn("shard-0")) as pool,
        database(cluster.shard_dsn("shard-0")) as watcher,
    ):
        here = Database(pool)
        async with here.reading(Deadline.after(5)) as connection:
            pid = connection.get_server_pid()
        with pytest.raises(InvalidArgument):
            async with here.reading(Deadline.after(5)) as connection:
                await connection.fetch("SELECT id FROM memories WHERE version = $1", "no number")
        held = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND relation = 'memories'::regclass"
        assert await watcher.fetchval(held, pid) == 0


async def test_a_connection_to_a_server_that_is_silent_is_given_up_at_once(cluster: LocalCluster) -> None:
    """Whoever's use of it failed does not wait until the server can be asked to end it."""
    dsn = urlsplit(cluster.shard_dsn("shard-0"))
    where = f"{dsn.hostname}:{dsn.port}"
    async with Proxies({"server": where}) as proxies:
        through = urlunsplit(dsn).replace(where, proxies.addresses["server"])
        async with pool_of_one(through) as pool:
            here = Database(pool)
            async with here.reading(Deadline.after(60)) as connection:
                assert await connection.fetchval("SELECT 1") == 1
            await proxies.inflict(Fault.BLACK_HOLE, "server")
            async with asyncio.timeout(3):
                with pytest.raises(ZeroDivisionError):
                    async with here.reading(Deadline.after(60)):
                        raise ZeroDivisionError
            await proxies.heal("server")
            async with here.reading(Deadline.after(60)) as connection:
                assert await connection.fetchval("SELECT 1") == 1
