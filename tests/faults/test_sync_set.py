"""Durability on real servers: QUORUM is said when it is so, nothing is acknowledged that could be lost under it."""

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import grpc
import pytest_asyncio

from common import catalog
from common.sync_set import SyncSet
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from tests.support.eventually import eventually
from tests.support.place import Place, refused
from tests.support.replicated import SHARD, Node, Replicated, replicated
from tests.support.wire import database, reason_of

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub

NOBODY: frozenset[str] = frozenset()
WAITING_FOR_A_LOCK = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[Replicated]:
    async with replicated("b") as running:
        await _keep_a_sync_set(running)
        yield running


async def _keep_a_sync_set(servers: Replicated) -> None:
    async with database(servers.catalog.dsn()) as connection:
        await catalog.create_sync_set(connection, SHARD, SyncSet("a", NOBODY))


async def _durability(stub: "ShardServiceAsyncStub") -> str:
    """What a write would be acknowledged with now, by the service itself."""
    described = await stub.Describe(shard_pb2.DescribeRequest(), timeout=2)
    return pb.Durability.Name(described.durability).removeprefix("DURABILITY_")


async def _becomes(stub: "ShardServiceAsyncStub", durability: str, within_s: float = 10.0) -> None:
    async def is_so() -> bool:
        return await _durability(stub) == durability

    await eventually(is_so, within_s=within_s)


async def _stored(place: Place, content: str = "tea", timeout_s: float = 20.0) -> str:
    """Stores a memory; returns what the receipt says."""
    answer = await place.shard.Store(place.store_request(content), timeout=timeout_s)
    return pb.Durability.Name(answer.commit.durability).removeprefix("DURABILITY_")


async def _is_streaming(node: Node) -> bool:
    return bool(await node.fetchval("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))


async def _is_waiting(node: Node) -> bool:
    return bool(await node.fetchval(WAITING))


@asynccontextmanager
async def _under_quorum(servers: Replicated, **settings: object) -> AsyncIterator[Place]:
    place = Place(servers, await servers.start_shard("shard", **settings))
    await _becomes(place.shard, "QUORUM")
    yield place


async def _outlive_the_catalogs_news(place: Place) -> None:
    """Writes until the keeper, which acts on what it has heard for a second, has to ask the catalog again."""
    loop = asyncio.get_running_loop()
    until = loop.time() + 1.2
    while loop.time() < until:
        assert await _stored(place) == "QUORUM"


async def test_quorum_begins_by_itself_and_is_recorded_before_it_is_said(servers: Replicated) -> None:
    async with _under_quorum(servers) as place:
        assert await _stored(place) == "QUORUM"
        assert await servers.sync_set() == SyncSet("a", frozenset({"b"}), None, 3)
        described = await place.shard.Describe(shard_pb2.DescribeRequest())
        assert list(described.sync_set) == ["b"]
        assert await servers.primary.fetchval("SHOW synchronous_standby_names") == 'ANY 1 ("b")'


async def test_the_last_standby_dies_writes_go_on_as_local_and_quorum_comes_back(servers: Replicated) -> None:
    async with _under_quorum(servers) as place:
        await servers.standby.kill()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        assert await _stored(place, "alone") == "LOCAL"
        assert loop.time() - begun < 5
        recorded = await servers.sync_set()
        assert NOBODY in (recorded.members, recorded.following)
        assert await _stored(place, "alone again") == "LOCAL"
        assert await _durability(place.shard) == "LOCAL"
        await servers.standby.start()
        await _becomes(place.shard, "QUORUM")
        assert await _stored(place, "together") == "QUORUM"


async def test_a_standby_that_is_frozen_is_lost_too(servers: Replicated) -> None:
    async with _under_quorum(servers) as place:
        servers.standby.freeze()
        assert await _stored(place, "alone", timeout_s=6) == "LOCAL"
        servers.standby.thaw()
        await _becomes(place.shard, "QUORUM")


async def test_refuse_waits_for_the_standby(servers: Replicated) -> None:
    async with _under_quorum(servers, on_standby_loss="refuse", standby_loss_s=0.5) as place:
        await servers.standby.kill()
        write = asyncio.ensure_future(_stored(place))
        await eventually(lambda: _is_waiting(servers.primary))
        done, _ = await asyncio.wait([write], timeout=2)
        assert not done
        await servers.standby.start()
        assert await write in ("QUORUM", "LOCAL")
        assert (await servers.sync_set()).members == {"b"}


async def test_with_the_catalog_and_the_standby_away_nothing_is_acknowledged(servers: Replicated) -> None:
    async with _under_quorum(servers) as place:
        servers.catalog_link.refuse()
        await servers.standby.kill()
        write = asyncio.ensure_future(_stored(place))
        await eventually(lambda: _is_waiting(servers.primary))
        done, _ = await asyncio.wait([write], timeout=5)
        assert not done
        servers.catalog_link.accept()
        assert await write == "LOCAL"
        recorded = await servers.sync_set()
        assert NOBODY in (recorded.members, recorded.following)


async def test_the_catalog_alone_away_costs_nothing(servers: Replicated) -> None:
    async with _under_quorum(servers) as place:
        servers.catalog_link.refuse()
        assert [await _stored(place) for _ in range(20)] == ["QUORUM"] * 20
        servers.catalog_link.accept()


async def test_nothing_is_promised_of_a_successor_while_the_catalog_hangs(servers: Replicated) -> None:
    async with _under_quorum(servers, standby_loss_s=60) as place:
        servers.catalog.freeze()
        # The keeper is in the midst of a question then, which it gives up after 2 s.
        await _outlive_the_catalogs_news(place)
        await servers.primary.kill()
        await servers.standby.promote()
        answer = await place.shard.Store(place.store_request("after"), timeout=20)
        assert (answer.commit.timeline, answer.commit.durability) == (2, pb.DURABILITY_LOCAL)
        described = await place.shard.Describe(shard_pb2.DescribeRequest(), timeout=2)
        assert (described.position.timeline, list(described.sync_set)) == (2, [])


async def test_split_brain_an_old_primary_acknowledges_and_answers_nothing(servers: Replicated) -> None:
    """The old primary keeps one client, the shard's service; all others have gone over to its standby."""
    own = {"database_dsn": servers.primary.dsn("memshard_app"), "migration_dsn": servers.primary.dsn("memshard_owner")}
    async with _under_quorum(servers, **own) as place:
        before = await _stored(place, "before")
        assert before == "QUORUM"
        assert servers.standby.link is not None
        servers.standby.link.refuse()
        servers.catalog_link.refuse()
        async with database(servers.catalog.dsn()) as connection:
            recorded = await servers.sync_set()
            await catalog.change_primary(connection, 1, SHARD, recorded, primary="b", members=NOBODY)
        await servers.standby.promote()
        write = asyncio.ensure_future(_stored(place, "lost"))
        await eventually(lambda: _is_waiting(servers.primary))
        done, _ = await asyncio.wait([write], timeout=5)
        assert not done
        # It hears of the other: now it says so, instead of waiting.
        servers.catalog_link.accept()

        async def says_so() -> bool:
            try:
                await _stored(place, "lost as well", timeout_s=1)
            except grpc.aio.AioRpcError as error:
                return reason_of(error) == "NOT_PRIMARY"
            raise AssertionError("acknowledged")

        await eventually(says_so)
        # Nor does it answer, since it cannot know what the other has been told.
        error = await refused(place.contents(None, place.shard))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NOT_PRIMARY")
        assert not write.done()
        write.cancel()
        async with database(servers.standby.dsn()) as connection:
            rows = await connection.fetch("SELECT content FROM memories")
        assert [row["content"] for row in rows] == ["before"]
        print("split brain: 0 writes acknowledged by the old primary, 0 of its rows on the new one")


async def test_a_cut_short_wait_is_an_unknown_outcome_and_the_same_request_settles_it(servers: Replicated) -> None:
    async with _under_quorum(servers, standby_loss_s=60) as place:
        assert servers.standby.link is not None
        servers.standby.link.refuse()
        request = place.store_request("in doubt")
        write = asyncio.ensure_future(place.shard.Store(request, timeout=20))
        await eventually(lambda: _is_waiting(servers.primary))
        await servers.primary.execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        )
        error = await refused(write)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
        # It is there, and on no standby: the repetition waits as well.
        again = asyncio.ensure_future(place.shard.Store(request, timeout=20))
        await eventually(lambda: _is_waiting(servers.primary))
        done, _ = await asyncio.wait([again], timeout=1)
        assert not done
        servers.standby.link.accept()
        assert (await again).memory.content == "in doubt"
        assert await place.contents(None, place.shard) == ["in doubt"]


async def test_a_backend_that_is_shut_down_while_it_waits_leaves_the_outcome_unknown(servers: Replicated) -> None:
    async with _under_quorum(servers, standby_loss_s=60) as place:
        assert servers.standby.link is not None
        servers.standby.link.refuse()
        write = asyncio.ensure_future(_stored(place, "in doubt"))
        await eventually(lambda: _is_waiting(servers.primary))
        await servers.primary.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        )
        error = await refused(write)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN")
        servers.standby.link.accept()


async def test_a_repeated_write_waits_for_the_quorum_after_a_crash(servers: Replicated) -> None:
    """What it finds may have been committed before the crash, and be on no standby yet."""
    async with _under_quorum(servers, standby_loss_s=60) as place:
        assert servers.standby.link is not None
        servers.standby.link.refuse()
        store = place.store_request("tea")
        batch = shard_pb2.StoreBatchRequest(
            route=place.route(),
            items=[
                shard_pb2.StoreItem(slot=place.slot, memory=store.memory, digest=store.digest),
            ],
        )
        delete = shard_pb2.DeleteRequest(
            route=place.route(), user_id=place.user, id=str(uuid.uuid4()), request_id="once"
        )
        claim = shard_pb2.ClaimRequest(
            route=place.route(),
            items=[
                shard_pb2.ClaimItem(
                    home_slot=place.slot, user_id=place.user, id=store.memory.id, digest=b"\0" * 32, memory_slot=1
                )
            ],
        )
        writes = [
            asyncio.ensure_future(call)
            for call in (place.shard.Store(store), place.shard.Delete(delete), place.shard.Claim(claim))
        ]

        async def all_wait() -> bool:
            return bool(await servers.primary.fetchval(WAITING) == len(writes))

        await eventually(all_wait)
        await servers.primary.kill()
        for error in await asyncio.gather(*writes, return_exceptions=True):
            assert isinstance(error, grpc.aio.AioRpcError)
            assert reason_of(error) == "OUTCOME_UNKNOWN"
        await servers.primary.start()
        again = [
            asyncio.ensure_future(call)
            for call in (
                place.shard.Store(store, timeout=30),
                place.shard.StoreBatch(batch, timeout=30),
                place.shard.Delete(delete, timeout=30),
                place.shard.Claim(claim, timeout=30),
            )
        ]
        await eventually(lambda: _is_waiting(servers.primary), within_s=20)
        done, _ = await asyncio.wait(again, timeout=2)
        assert not done
        servers.standby.link.accept()
        await asyncio.gather(*again)
        assert await place.contents(None, place.shard) == ["tea"]


async def test_a_service_that_starts_says_quorum_once_it_has_seen_that_it_is_so(servers: Replicated) -> None:
    async with _under_quorum(servers):
        await servers.stop("shard")
    # The setting was lost meanwhile, as by a restored configuration.
    await servers.primary.set_sync_names("")
    place = Place(servers, await servers.start_shard())
    assert await _stored(place) in ("LOCAL", "QUORUM")
    await _becomes(place.shard, "QUORUM")
    assert await servers.primary.fetchval("SHOW synchronous_standby_names") == 'ANY 1 ("b")'
    assert await servers.sync_set() == SyncSet("a", frozenset({"b"}), None, 3)


async def test_a_change_that_was_left_half_done_is_finished(servers: Replicated) -> None:
    async with _under_quorum(servers):
        await servers.stop("shard", signal.SIGKILL)
    async with database(servers.catalog.dsn()) as connection:
        await catalog.change_sync_set(
            connection, SHARD, await servers.sync_set(), members=frozenset({"b"}), following=NOBODY
        )
    place = Place(servers, await servers.start_shard())
    await _becomes(place.shard, "QUORUM")
    recorded = await servers.sync_set()
    assert recorded == SyncSet("a", frozenset({"b"}), None, recorded.version)
    assert recorded.version > 4


async def test_a_setting_changed_by_hand_ends_quorum_until_it_is_put_right(servers: Replicated) -> None:
    async with _under_quorum(servers) as place:
        # Nobody can put it right while the catalog is away.
        servers.catalog_link.refuse()
        await _outlive_the_catalogs_news(place)
        await servers.primary.set_sync_names("")
        await servers.standby.kill()
        assert [await _stored(place, "alone", timeout_s=2) for _ in range(5)] == ["LOCAL"] * 5

        async def nothing_is_certain() -> bool:
            return not list((await place.shard.Describe(shard_pb2.DescribeRequest(), timeout=2)).sync_set)

        await eventually(nothing_is_certain)
        await servers.standby.start()
        await eventually(lambda: _is_streaming(servers.primary))
        # Right again, and who knows what was committed meanwhile.
        await servers.primary.set_sync_names('ANY 1 ("b")')
        assert await _stored(place) == "LOCAL"
        await servers.primary.set_sync_names("")
        servers.catalog_link.accept()

        async def is_right() -> bool:
            names = await servers.primary.fetchval("SHOW synchronous_standby_names")
            return bool(names == 'ANY 1 ("b")')

        await eventually(is_right)
        await _becomes(place.shard, "QUORUM")
        assert await _stored(place) == "QUORUM"


async def test_without_a_sync_set_in_the_catalog_nothing_is_changed_and_writes_are_local() -> None:
    async with replicated("b") as servers:
        place = Place(servers, await servers.start_shard())
        assert await _stored(place) == "LOCAL"
        await servers.primary.set_sync_names('ANY 1 ("b")')
        assert await _stored(place) == "LOCAL"
        # Of whoever runs PostgreSQL, the setting is believed.
        await servers.stop("shard")
        place = Place(servers, await servers.start_shard(sync_set="external"))
        assert await _stored(place) == "QUORUM"
        await servers.primary.set_sync_names("")
        assert await _stored(place) == "LOCAL"
        # It has to have been so before the commit as well.
        async with database(servers.primary.dsn()) as connection, connection.transaction():
            await connection.execute("SELECT FROM owned_slots WHERE slot = $1 FOR UPDATE", place.slot)
            write = asyncio.ensure_future(_stored(place))
            await eventually(lambda: servers.primary.fetchval(WAITING_FOR_A_LOCK))
            await servers.primary.set_sync_names('ANY 1 ("b")')
        assert await write == "LOCAL"
        assert await _stored(place) == "QUORUM"


async def test_an_erasure_waits_for_the_standbys_or_names_those_that_have_not_replayed_it(
    servers: Replicated,
) -> None:
    async with _under_quorum(servers) as place:
        assert await _stored(place, "secret") == "QUORUM"
        erase = shard_pb2.EraseRequest(route=place.route(), user_id=place.user, request_id="once")
        await servers.standby.pause_replay()
        answer = await place.shard.Erase(erase, timeout=10)
        assert (answer.memories_erased, len(answer.ids), list(answer.unconfirmed)) == (1, 1, ["b"])
        assert (await place.shard.Erase(erase, timeout=10)).unconfirmed == ["b"]
        waiting = asyncio.ensure_future(place.shard.Erase(erase, timeout=15))
        await servers.standby.resume_replay()
        answer = await waiting
        assert (answer.memories_erased, list(answer.unconfirmed)) == (1, [])
        assert await servers.standby.fetchval("SELECT count(*) FROM memories") == 0
        # One that is away has not.
        await servers.standby.stop()
        await _becomes(place.shard, "LOCAL")
        assert (await place.shard.Erase(erase, timeout=10)).unconfirmed == ["b"]
        await servers.standby.start()
        await eventually(lambda: _is_streaming(servers.primary))
        assert (await place.shard.Erase(erase, timeout=15)).unconfirmed == []


async def test_the_serving_role_cannot_change_the_setting(servers: Replicated) -> None:
    async with database(servers.primary.dsn("memshard_app")) as connection:
        try:
            await connection.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        except asyncpg.InsufficientPrivilegeError:
            return
    raise AssertionError("it can")
