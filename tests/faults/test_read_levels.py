"""The read levels on a cluster with a standby whose replay can be held: who answers, and what never is answered."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from common import catalog
from memshard import AsyncMemoryClient, ReadLevel
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.tokens import Tokens
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.replay import replay_paused
from tests.support.wire import database, fields_of, memory_service, reason_of, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

SHARD = "shard-0"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def replicated() -> AsyncIterator[LocalCluster]:
    """A running cluster of one shard with a standby."""
    async with LocalCluster(shards=1, replicas=1) as running:
        await eventually(running.healthy, within_s=60)
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def api(replicated: LocalCluster) -> "AsyncIterator[MemoryServiceAsyncStub]":
    """Its public API."""
    async with memory_service(replicated.address) as stub:
        yield stub


@asynccontextmanager
async def stopped(cluster: LocalCluster, name: str) -> AsyncIterator[None]:
    """While it lasts, a process answers nothing."""
    cluster.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        cluster.kill(name, signal.SIGCONT)


async def listed(
    api: "MemoryServiceAsyncStub", user: str, options: pb.ReadOptions | None = None, *, timeout_s: float = 10
) -> tuple[list[str], list[str]]:
    """What a user has, and who says so."""
    answer = await api.ListMemories(pb.ListMemoriesRequest(user_id=user, read=options), timeout=timeout_s)
    return [memory.content for memory in answer.memories], list(answer.report.served_by)


async def refusal(api: "MemoryServiceAsyncStub", user: str, options: pb.ReadOptions) -> grpc.aio.AioRpcError:
    """How such a read is refused, which it must be. On a machine that stands still it may end with its time instead,
    and says nothing then: it is asked again.
    """
    for _ in range(5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed(api, user, options, timeout_s=2)
        if caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            break
    return caught.value


def session(*tokens: bytes) -> pb.ReadOptions:
    return pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=tokens)


EVENTUAL = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)


def bounded(seconds: int) -> pb.ReadOptions:
    return pb.ReadOptions(level=pb.READ_LEVEL_BOUNDED_STALENESS, max_staleness=duration_pb2.Duration(seconds=seconds))


def retry_after_s(error: grpc.aio.AioRpcError) -> float:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        info = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            return float(info.retry_delay.ToMilliseconds()) / 1000
    return 0.0


async def test_strong_reads_are_the_primarys_and_the_others_a_replicas(
    api: "MemoryServiceAsyncStub", user: str
) -> None:
    token = (await api.StoreMemory(store_request(user, "tea"))).receipt.consistency_token
    for strong in (None, pb.ReadOptions(), pb.ReadOptions(level=pb.READ_LEVEL_STRONG)):
        assert await listed(api, user, strong) == (["tea"], ["primary"])
    for options in (session(token), bounded(30), EVENTUAL):
        await eventually(lambda options=options: _is(api, user, options, (["tea"], ["replica"])))  # type: ignore[misc]
    search = pb.SearchMemoriesRequest(query="tea", read=EVENTUAL)
    assert list((await api.SearchMemories(search)).report.served_by) == ["replica"]


async def _is(
    api: "MemoryServiceAsyncStub", user: str, options: pb.ReadOptions, expected: tuple[list[str], list[str]]
) -> bool:
    return await listed(api, user, options) == expected


async def test_a_lagging_replica_answers_only_what_it_has(
    replicated: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    before = (await api.StoreMemory(store_request(user, "tea"))).receipt.consistency_token
    await eventually(lambda: _is(api, user, session(before), (["tea"], ["replica"])))
    async with replay_paused(replicated, SHARD):
        after = (await api.StoreMemory(store_request(user, "coffee"))).receipt.consistency_token
        for _ in range(3):
            assert await listed(api, user, session(before, after)) == (["coffee", "tea"], ["primary"])
            # Eventually, as the primary answers too where the replica is late.
            await eventually(lambda: _is(api, user, session(before), (["tea"], ["replica"])))
            await eventually(lambda: _is(api, user, EVENTUAL, (["tea"], ["replica"])))
        await eventually(lambda: _is(api, user, bounded(20), (["tea"], ["replica"])))
        print("all standbys lag: 3 of 3 reads that need more went to the primary, 7 of 7 others to the replica")
        # Its age grows while it is held.
        await eventually(lambda: _is(api, user, bounded(2), (["coffee", "tea"], ["primary"])))
    await eventually(lambda: _is(api, user, session(after), (["coffee", "tea"], ["replica"])), within_s=5)


async def test_none_fresh_and_the_primary_away_is_unavailable_and_never_an_old_answer(
    replicated: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    before = (await api.StoreMemory(store_request(user, "tea"))).receipt.consistency_token
    await eventually(lambda: _is(api, user, session(before), (["tea"], ["replica"])))
    async with replay_paused(replicated, SHARD):
        after = (await api.StoreMemory(store_request(user, "coffee"))).receipt.consistency_token
        async with stopped(replicated, SHARD):
            error = await refusal(api, user, session(after))
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NO_FRESH_SERVER")
            assert retry_after_s(error) > 0
            print(f"none fresh, primary away: UNAVAILABLE, to be tried again after {retry_after_s(error):.2f} s")
            # Whoever asks for less has it.
            await eventually(lambda: _is(api, user, session(before), (["tea"], ["replica"])))
            await eventually(lambda: _is(api, user, EVENTUAL, (["tea"], ["replica"])))
    assert await listed(api, user) == (["coffee", "tea"], ["primary"])


async def test_nobody_claims_to_have_what_is_on_a_later_timeline(
    replicated: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    async with database(replicated.catalog_dsn()) as connection:
        tokens = Tokens((await catalog.read_cluster(connection)).token_key)
    later = tokens.receipt((SHARD, shard_pb2.Commit(timeline=1_000, lsn=1))).consistency_token
    error = await refusal(api, user, session(later))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NO_FRESH_SERVER")
    # An earlier one says nothing that a later server has not, wherever on it that was; nor does a shard that is gone.
    gone = tokens.receipt(("gone", shard_pb2.Commit(timeline=1, lsn=2**62))).consistency_token
    await eventually(lambda: _is(api, user, session(gone), ([], ["replica"])))


async def test_tokens_of_another_cluster_are_refused_at_every_level(api: "MemoryServiceAsyncStub", user: str) -> None:
    other = Tokens(b"o" * 32).receipt((SHARD, shard_pb2.Commit(timeline=1, lsn=1))).consistency_token
    for level in (pb.READ_LEVEL_STRONG, pb.READ_LEVEL_SESSION, pb.READ_LEVEL_EVENTUAL):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed(api, user, pb.ReadOptions(level=level, consistency_tokens=[other]))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (reason_of(caught.value), fields_of(caught.value)) == (
            "BAD_CONSISTENCY_TOKEN",
            ["read.consistency_tokens"],
        )


async def test_a_client_sees_its_own_writes_and_those_of_a_session_that_it_joins(
    replicated: LocalCluster, user: str
) -> None:
    async with AsyncMemoryClient(replicated.address) as one, AsyncMemoryClient(replicated.address) as other:
        async with replay_paused(replicated, SHARD):
            stored = (await one.store(user, "tea")).memory
            assert (await one.get(stored.id, user_id=user)).content == "tea"
            assert [found.memory.content for found in (await one.search("tea", user_id=user)).results] == ["tea"]
            assert (await one.get(stored.id)).content == "tea"
            assert (await other.list_memories(user)).memories == ()
            other.join_session(user, one.session_tokens(user))
            page = await other.list_memories(user)
            assert ([memory.content for memory in page.memories], page.report.served_by) == (["tea"], ("primary",))
        await one.delete(user, stored.id)
        assert (await one.list_memories(user)).memories == ()
        assert (await one.list_memories(user, read=ReadLevel.STRONG)).report.served_by == ("primary",)
