"""Two routers that remember memories: what they answer from there, what they never do, and what is forgotten when."""

import asyncio
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio
from google.protobuf import duration_pb2
from redis.asyncio import Redis

from common import catalog
from local.postgres import SUPERUSER
from memshard.v1 import memory_pb2 as pb
from router.envelope import Envelopes
from tests.support.cluster import PATIENT_WITH_REDIS, LocalCluster
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

EVENTUAL = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)


def session(*tokens: bytes) -> pb.ReadOptions:
    return pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=tokens)


def bounded(seconds: float) -> pb.ReadOptions:
    staleness = duration_pb2.Duration()
    staleness.FromMilliseconds(round(seconds * 1000))
    return pb.ReadOptions(level=pb.READ_LEVEL_BOUNDED_STALENESS, max_staleness=staleness)


@dataclass(frozen=True)
class Pair:
    """A cluster with two routers, and with standbys."""

    cluster: LocalCluster
    one: "MemoryServiceAsyncStub"
    other: "MemoryServiceAsyncStub"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair() -> AsyncIterator[Pair]:
    async with LocalCluster(shards=2, routers=2, replicas=1, environment=PATIENT_WITH_REDIS) as cluster:
        await eventually(cluster.healthy, within_s=60)
        host, port = cluster.address.split(":")
        async with memory_service(cluster.address) as one, memory_service(f"{host}:{int(port) + 1}") as other:
            yield Pair(cluster, one, other)


async def got(
    api: "MemoryServiceAsyncStub", memory: pb.Memory, read: pb.ReadOptions | None = None
) -> tuple[str, list[str]]:
    """What a memory says, and who says so."""
    answer = await api.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=memory.user_id, read=read))
    assert answer.memory.user_id == memory.user_id
    return answer.memory.content, list(answer.report.served_by)


async def remembered(
    api: "MemoryServiceAsyncStub", memory: pb.Memory, content: str, read: pb.ReadOptions = EVENTUAL
) -> None:
    """Returns once a router answers from its own memory."""
    await eventually(lambda: _is(api, memory, read, (content, ["cache"])))


async def _is(
    api: "MemoryServiceAsyncStub", memory: pb.Memory, read: pb.ReadOptions, expected: tuple[str, list[str]]
) -> bool:
    return await got(api, memory, read) == expected


def update_of(memory: pb.Memory, content: str) -> pb.UpdateMemoryRequest:
    request = pb.UpdateMemoryRequest(memory=pb.Memory(id=memory.id, user_id=memory.user_id, content=content))
    request.update_mask.paths.append("content")
    return request


async def test_what_was_read_is_answered_from_memory_but_for_strong_reads(pair: Pair, user: str) -> None:
    stored = await pair.one.StoreMemory(store_request(user, "tea", metadata={"kind": "drink"}))
    memory, token = stored.memory, stored.receipt.consistency_token
    for read in (EVENTUAL, session(token), bounded(60)):
        await remembered(pair.one, memory, "tea", read)
    wanted = pb.GetMemoryRequest(id=memory.id, user_id=user, read=EVENTUAL)

    async def from_memory() -> pb.GetMemoryResponse | None:
        answer = await pair.one.GetMemory(wanted)
        return answer if list(answer.report.served_by) == ["cache"] else None

    whole = await eventually(from_memory)
    assert whole is not None
    strong = await pair.one.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=user))
    assert whole.memory == strong.memory
    assert list(strong.report.served_by) == ["primary"]
    # It says that no shard was asked, and at which level it was answered.
    assert whole.report == pb.ReadReport(
        served_by=["cache"], shards=pb.ShardSummary(), degradation_level=strong.report.degradation_level
    )
    assert (await got(pair.one, memory, bounded(0.001)))[1] != ["cache"]


async def test_an_embedding_is_answered_to_those_who_ask_for_it(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "tea"))).memory
    wanted = pb.GetMemoryRequest(id=memory.id, user_id=user, read=EVENTUAL, include_embedding=True)

    async def from_memory() -> pb.GetMemoryResponse | None:
        answer = await pair.one.GetMemory(wanted)
        return answer if list(answer.report.served_by) == ["cache"] else None

    answer = await eventually(from_memory)
    assert answer is not None
    assert len(answer.memory.embedding) == 256
    await remembered(pair.one, memory, "tea")
    plain = await pair.one.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=user, read=EVENTUAL))
    assert not plain.memory.embedding


async def test_another_user_is_not_answered_from_it(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "secret"))).memory
    await remembered(pair.one, memory, "secret")
    for other in (f"{user}x", user[:-1], user.upper()):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pair.one.GetMemory(pb.GetMemoryRequest(id=memory.id, user_id=other, read=EVENTUAL))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    theirs = (await pair.one.StoreMemory(store_request(f"{user}x", "theirs", memory.id))).memory
    for _ in range(3):
        assert (await got(pair.one, theirs, EVENTUAL))[0] == "theirs"
        assert (await got(pair.one, memory, EVENTUAL))[0] == "secret"


async def test_a_change_is_seen_at_once_where_it_was_made_and_soon_elsewhere(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "tea"))).memory
    for api in (pair.one, pair.other):
        await remembered(api, memory, "tea")
    token = (await pair.one.UpdateMemory(update_of(memory, "coffee"))).receipt.consistency_token
    # Whoever has its token sees it everywhere, told or not.
    for api in (pair.one, pair.other):
        assert (await got(api, memory, session(token)))[0] == "coffee"
    await eventually(lambda: _says(pair.other, memory, "coffee"))
    await remembered(pair.other, memory, "coffee", session(token))
    token = (
        await pair.other.DeleteMemory(pb.DeleteMemoryRequest(id=memory.id, user_id=user))
    ).receipt.consistency_token
    for api in (pair.one, pair.other):
        assert await _is_gone(api, memory, session(token))
        await eventually(lambda api=api: _is_gone(api, memory))  # type: ignore[misc]


async def _says(api: "MemoryServiceAsyncStub", memory: pb.Memory, content: str) -> bool:
    return (await got(api, memory, EVENTUAL))[0] == content


async def _is_gone(api: "MemoryServiceAsyncStub", memory: pb.Memory, read: pb.ReadOptions = EVENTUAL) -> bool:
    try:
        await got(api, memory, read)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.NOT_FOUND
    return False


async def test_what_is_erased_is_in_no_routers_memory_when_the_erasure_returns(pair: Pair, user: str) -> None:
    stored = [(await pair.one.StoreMemory(store_request(user, f"memory {n}"))).memory for n in range(20)]
    for api in (pair.one, pair.other):
        for n, memory in enumerate(stored):
            await remembered(api, memory, f"memory {n}")
    reading = [asyncio.create_task(_read_until_gone(api, m)) for api in (pair.one, pair.other) for m in stored]
    await pair.one.EraseUser(pb.EraseUserRequest(user_id=user))
    for api in (pair.one, pair.other):
        for memory in stored:
            assert await _is_gone(api, memory)
    await asyncio.gather(*reading)
    for api in (pair.one, pair.other):
        for memory in stored:
            assert await _is_gone(api, memory)


async def _read_until_gone(api: "MemoryServiceAsyncStub", memory: pb.Memory) -> None:
    while not await _is_gone(api, memory):
        await asyncio.sleep(0)


async def _entries(pair: Pair, memories: Sequence[pb.Memory]) -> list[str]:
    """The names of those of these memories that Redis has."""
    async with database(pair.cluster.catalog_dsn()) as connection:
        cluster = await catalog.read_cluster(connection)
    envelopes = Envelopes(cluster.token_key)
    names = [f"mem:{envelopes.digest(cluster.cluster_id, memory.user_id, memory.id)}:0" for memory in memories]
    redis = Redis.from_url(pair.cluster.redis_url())
    try:
        return [name for name, found in zip(names, await redis.mget(names), strict=True) if found is not None]
    finally:
        await redis.aclose()


async def test_what_one_router_read_another_answers_from_redis(pair: Pair, user: str) -> None:
    stored = await pair.one.StoreMemory(store_request(user, "tea"))
    memory, token = stored.memory, stored.receipt.consistency_token
    await remembered(pair.one, memory, "tea", session(token))

    async def is_there() -> bool:
        return bool(await _entries(pair, [memory]))

    await eventually(is_there)
    assert await got(pair.other, memory, session()) == ("tea", ["cache"])
    changed = (await pair.other.UpdateMemory(update_of(memory, "coffee"))).receipt.consistency_token
    for _ in range(20):
        assert (await got(pair.one, memory, session(changed)))[0] == "coffee"
        assert (await got(pair.other, memory, session(changed)))[0] == "coffee"


async def test_what_is_erased_is_not_in_redis_when_the_erasure_returns(pair: Pair, user: str) -> None:
    stored = [(await pair.one.StoreMemory(store_request(user, f"memory {n}"))).memory for n in range(10)]
    for n, memory in enumerate(stored):
        await remembered(pair.one, memory, f"memory {n}")

    async def all_there() -> bool:
        return len(await _entries(pair, stored)) == len(stored)

    await eventually(all_there)
    reading = [asyncio.create_task(_read_until_gone(api, m)) for api in (pair.one, pair.other) for m in stored]
    await pair.other.EraseUser(pb.EraseUserRequest(user_id=user))
    assert await _entries(pair, stored) == []
    await asyncio.gather(*reading)
    assert await _entries(pair, stored) == []


async def test_what_a_standby_still_has_does_not_come_back_after_an_erasure(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "tea"))).memory
    for api in (pair.one, pair.other):
        await remembered(api, memory, "tea")
    shard = (await topology_of(pair.cluster.catalog_dsn())).owner(user_slot(user)).shard_id
    (standby,) = pair.cluster.standbys(shard)
    plan = pair.cluster.plan()
    async with database(plan.shard_servers(shard)[standby].dsn(SUPERUSER, plan.secrets.postgres)) as connection:
        await connection.execute("SELECT pg_wal_replay_pause()")
        try:
            await eventually(
                lambda: connection.fetchval(
                    "SELECT pg_get_wal_replay_pause_state() = 'paused'"
                )  # At some record's end.
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pair.one.EraseUser(pb.EraseUserRequest(user_id=user), timeout=8)
            assert reason_of(caught.value) == "ERASE_UNCONFIRMED"
            for api in (pair.one, pair.other):
                for _ in range(20):
                    assert await _is_not_from_memory(api, memory)
            assert await _entries(pair, [memory]) == []
        finally:
            await connection.execute("SELECT pg_wal_replay_resume()")

    async def erased() -> pb.EraseUserResponse:
        return await pair.other.EraseUser(pb.EraseUserRequest(user_id=user), timeout=8)

    await eventually(erased)
    for api in (pair.one, pair.other):
        assert await _is_gone(api, memory)
    assert await _entries(pair, [memory]) == []


async def test_an_expired_memory_is_not_answered(pair: Pair, user: str) -> None:
    request = store_request(user, "soon over")
    request.memory.expire_time.GetCurrentTime()
    request.memory.expire_time.seconds += 8
    memory = (await pair.one.StoreMemory(request)).memory
    await remembered(pair.one, memory, "soon over")
    await eventually(lambda: _is_gone(pair.one, memory), within_s=20)


async def test_a_router_that_does_not_hear_the_others_answers_nothing_from_memory(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "tea"))).memory
    await remembered(pair.one, memory, "tea")
    pair.cluster.kill("redis", signal.SIGSTOP)
    try:
        await eventually(lambda: _is_not_from_memory(pair.one, memory))
        for _ in range(5):
            assert await _is_not_from_memory(pair.one, memory)
        # What is changed meanwhile is seen when it hears them again: it has forgotten everything.
        await pair.other.UpdateMemory(update_of(memory, "coffee"))
    finally:
        pair.cluster.kill("redis", signal.SIGCONT)
    await remembered(pair.one, memory, "coffee")


async def _is_not_from_memory(api: "MemoryServiceAsyncStub", memory: pb.Memory) -> bool:
    """Whether a server is asked, whatever it says."""
    try:
        return (await got(api, memory, EVENTUAL))[1] != ["cache"]
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_shard_in_maintenance_is_not_stood_in_for(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "tea"))).memory
    await remembered(pair.one, memory, "tea")
    shard = (await topology_of(pair.cluster.catalog_dsn())).owner(user_slot(user)).shard_id
    await _set_status(pair.cluster, shard, "maintenance")
    try:

        async def refused() -> bool:
            try:
                await got(pair.one, memory, EVENTUAL)
            except grpc.aio.AioRpcError as error:
                return reason_of(error) == "SHARD_MAINTENANCE"
            return False

        await eventually(refused)
    finally:
        await _set_status(pair.cluster, shard, "active")
    await remembered(pair.one, memory, "tea")


async def _set_status(cluster: LocalCluster, shard_id: str, status: str) -> None:
    async with database(cluster.catalog_dsn(owner=True)) as connection, connection.transaction():
        await connection.execute("UPDATE shards SET status = $2 WHERE shard_id = $1", shard_id, status)
        epoch = await connection.fetchval("UPDATE topology SET epoch = epoch + 1 RETURNING epoch")
        await connection.execute("SELECT pg_notify($1, $2)", catalog.CHANNEL, str(epoch))


@dataclass
class Agent:
    """Changes one memory again and again, and reads it at both routers with the token of his last change."""

    memory: pb.Memory
    token: bytes
    version: int = 0
    stale: int = 0
    served_by: Counter[str] = field(default_factory=Counter)

    async def run(self, pair: Pair, number: int, until: float) -> None:
        loop = asyncio.get_running_loop()
        routers = (pair.one, pair.other)
        while loop.time() < until:
            self.version += 1
            request = update_of(self.memory, f"version {self.version}")
            request.request_id = str(uuid.uuid4())
            answer = await routers[(number + self.version) % 2].UpdateMemory(request)
            self.token = answer.receipt.consistency_token
            readers = (self._read(api, loop.time() + 0.7) for api in routers)
            await asyncio.gather(*readers)

    async def _read(self, api: "MemoryServiceAsyncStub", until: float) -> None:
        # Each memory has one writer: what he reads with the token of his last change is that change.
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            content, served_by = await got(api, self.memory, session(self.token))
            self.stale += content != f"version {self.version}"
            self.served_by["+".join(served_by)] += 1
            await asyncio.sleep(0.01)


async def test_nobody_who_shows_a_token_is_answered_with_less(pair: Pair, user: str) -> None:
    """Each on his own memory, and all on the same two shards, whose positions are those of all of them."""
    agents = []
    for n in range(6):
        stored = await pair.one.StoreMemory(store_request(f"{user}-{n}", "version 0"))
        agents.append(Agent(stored.memory, stored.receipt.consistency_token))
    until = asyncio.get_running_loop().time() + 8
    await asyncio.gather(*(agent.run(pair, n, until) for n, agent in enumerate(agents)))
    served_by = sum((agent.served_by for agent in agents), Counter[str]())
    print(f"{sum(agent.version for agent in agents)} changes, read by {dict(served_by)}")
    assert sum(agent.stale for agent in agents) == 0
    assert served_by["cache"] > 0


async def test_what_is_remembered_is_counted(pair: Pair, user: str) -> None:
    memory = (await pair.one.StoreMemory(store_request(user, "tea"))).memory
    await remembered(pair.one, memory, "tea")
    families = await families_of(pair.cluster, "router-0")
    layers = {sample.labels["layer"]: sample.value for sample in families["memory_cache_hit_ratio"].samples}
    assert 0 < layers["memories"] <= 1
    assert families["memory_cached_memories"].samples[0].value >= 1
    assert 0 < families["memory_cached_bytes"].samples[0].value <= families["memory_cached_max_bytes"].samples[0].value
