"""`/metrics` of every service of a running cluster: what is there, that it moves, and that it stays small."""

import asyncio
import os
import re
import signal
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2
from prometheus_client import Metric

from common.bearer import credentials
from memshard.admin.v1 import cluster_pb2, cluster_pb2_grpc
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.metrics import families_of, names_of, page_of
from tests.support.wire import memory_service, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

SHARDS = ("shard-0", "shard-1", "shard-2")

Series = tuple[str, str, frozenset[tuple[str, str]]]
"""A service, a sample's name, its labels."""

# What the operator's pages rely on, besides what the rules and the dashboard name.
OF_A_ROUTER = {
    "memory_operations",
    "memory_operation_duration_seconds",
    "rpc_server_call_duration_seconds",
    "rpc_client_call_duration_seconds",
    "circuit_breaker_state",
    "degradation_mode_active",
    "memory_cache_hit_ratio",
    "memory_retry_budget_available",
    "memory_hedges",
    "memory_requests_shed",
    "memory_shard_slots",
    "memory_moves",
    "memory_moves_unattended",
    "memory_moving_slots",
    "agent_query_frequency",
    "agent_context_size_bytes",
    "agent_memory_relevance_score",
    "memory_batch_size",
    "active_memory_connections",
}
OF_A_SHARD = {
    "memory_operations",
    "memory_store_size_bytes",
    "connection_pool_usage",
    "active_memory_connections",
    "memory_embedding_queue_length",
    "memory_database_statement_duration_seconds",
    "memory_writes_acknowledged",
    "process_resident_memory_bytes",
}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels."""
    return sum(
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def use(api: "MemoryServiceAsyncStub", user: str) -> None:
    """Every kind of call once."""
    stored = await api.StoreMemory(store_request(user, "Alice drinks green tea"))
    await api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id))
    await api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="tea"))
    await api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=[pb.Memory(user_id=user, content="Bob")]))
    with pytest.raises(grpc.aio.AioRpcError):
        await api.SearchMemories(pb.SearchMemoriesRequest(user_id=user))


async def test_each_service_has_the_metrics_of_what_it_does(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    await use(api, user)
    router = await families_of(cluster, "router-0")
    assert router.keys() >= OF_A_ROUTER
    await eventually(lambda: measured(cluster), within_s=30)
    shard = await families_of(cluster, "shard-0")
    assert shard.keys() >= OF_A_SHARD
    assert value(router, "memory_shard_slots") == 16_384
    # A busy machine may be at another level than normal, but at one.
    assert value(router, "degradation_mode_active", of="cluster") == 1
    assert value(router, "degradation_mode_active", of="shard-2") == 1

    async def all_are_closed() -> bool:
        return value(await families_of(cluster, "router-0"), "circuit_breaker_state") == 0

    await eventually(all_are_closed, within_s=30)
    assert value(shard, "memory_store_size_bytes") > 1_000_000


async def measured(cluster: LocalCluster) -> bool:
    return "memory_store_size_bytes" in await families_of(cluster, "shard-0")


async def test_calls_are_counted_by_operation_and_status_and_errors_by_reason(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    before = await families_of(cluster, "router-0")
    await use(api, user)
    after = await families_of(cluster, "router-0")

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("memory_operations_total", operation="SearchMemories", status="OK") == 1
    assert more("memory_operations_total", operation="SearchMemories", status="INVALID_ARGUMENT") == 1
    assert more("memory_operation_errors_total", operation="SearchMemories", reason="EMPTY_QUERY") == 1
    assert more("memory_operation_duration_seconds_count", operation="SearchMemories") == 1
    method = "memshard.v1.MemoryService/StoreMemory"
    assert more("rpc_server_call_duration_seconds_count", rpc_method=method, rpc_response_status_code="OK") == 1
    method = "memshard.internal.v1.ShardService/Store"
    # The health monitor stores too.
    assert more("rpc_client_call_duration_seconds_count", rpc_method=method, rpc_response_status_code="OK") >= 1
    assert more("memory_cache_requests_total", layer="memory", result="hit") >= 1
    assert more("agent_memory_relevance_score_count", score_kind="cosine") == 1
    assert more("memory_batch_size_sum") == 1
    assert value(after, "memory_operations_in_flight") == 0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def replicated() -> AsyncIterator[LocalCluster]:
    """A cluster of its own: of what others do to theirs, and when, there are series too."""
    async with LocalCluster(shards=3, replicas=1) as running:
        yield running


async def test_ten_thousand_users_add_no_series(replicated: LocalCluster, user: str) -> None:
    def memories(start: int) -> list[pb.Memory]:
        return [
            pb.Memory(user_id=f"{user}-{number}", content="tea", agent_id=f"agent-{number}", session_id=f"{number}")
            for number in range(start, start + 500)
        ]

    async with memory_service(replicated.address) as api:
        # Each server meets each operation, and each of its statements.
        await everybody(api, f"first-{user}", range(150))
        await api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories(0)), timeout=60)
        before = await series_of(replicated)
        for start in range(0, 10_000, 500):
            await api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories(start)), timeout=60)
        await everybody(api, user, range(0, 10_000, 50))
    after = await series_of(replicated)
    services = {service for service, _, _ in after}
    assert services == {"router-0", *SHARDS, *(f"{shard}-replica-1" for shard in SHARDS)}
    operations = {dict(labels)["operation"] for _, name, labels in after if name == "memory_operations_total"}
    assert operations >= {rpc.name for rpc in pb.DESCRIPTOR.services_by_name["MemoryService"].methods}
    known = {known_by(series) for series in before}
    assert sorted(map(str, {series for series in after - before if known_by(series) not in known})) == []
    assert not [series for series in after if user in str(series)]


async def test_a_replicas_lag_is_told_and_stays_known_while_it_does_not_serve(replicated: LocalCluster) -> None:
    async def told() -> dict[tuple[str, str], float]:
        """By name and replica."""
        router = await families_of(replicated, "router-0")
        return {
            (sample.name, sample.labels["replica"]): sample.value
            for name in ("memory_replica_serving", "replication_lag_seconds")
            for sample in router[name].samples
        }

    replica = "shard-0-replica-1"

    async def serves(wanted: int) -> bool:
        return (await told())["memory_replica_serving", replica] == wanted

    await eventually(lambda: serves(1), within_s=30)
    known = await told()
    lags = {name: value for (metric, name), value in known.items() if metric == "replication_lag_seconds"}
    assert lags.keys() == {f"{shard}-replica-1" for shard in SHARDS}
    assert all(0 <= lag < 30 for lag in lags.values())
    held = replicated.kill(replica, signal.SIGSTOP)
    try:
        await eventually(lambda: serves(0), within_s=20)
        assert 0 <= (await told())["replication_lag_seconds", replica] < 30
    finally:
        os.kill(held, signal.SIGCONT)
    await eventually(lambda: serves(1), within_s=30)


def known_by(series: Series) -> Series:
    """The same without what calls need not have met in a warm-up: a status or reason that they end with, such as
    CANCELLED of the slower of two, and a statement of what a shard does by itself. None can be what a caller chose."""
    service, name, labels = series

    def value(label: str, of: str) -> str:
        if label in {"status", "rpc_response_status_code"}:
            return "a status" if of in grpc.StatusCode.__members__ else of
        if label == "reason":
            return "a reason" if re.fullmatch("[A-Z_]+", of) else of
        return "a statement" if label == "statement" and re.fullmatch("[A-Z]+ [a-z_]+", of) else of

    return service, name, frozenset((label, value(label, of)) for label, of in labels)


async def everybody(api: "MemoryServiceAsyncStub", user: str, numbers: Iterable[int]) -> None:
    """Every operation for each of these users, some of whom are at it at once."""
    places = asyncio.Semaphore(8)

    async def one(name: str, number: int) -> None:
        async with places:
            await every_operation(api, name, f"agent-{number}")

    async with asyncio.TaskGroup() as tasks:
        for number in numbers:
            tasks.create_task(one(f"{user}-{number}", number))


async def every_operation(api: "MemoryServiceAsyncStub", user: str, agent: str) -> None:
    """All that a user can do, in what succeeds and in what fails, at the primaries and at the replicas."""
    fields: dict[str, Any] = {"agent_id": agent, "session_id": user}
    fresh = (await api.StoreMemory(store_request(user, f"{user} drinks tea", **fields), timeout=60)).memory.id
    # Of an older id no router knows the place.
    older = str(uuid.uuid4())
    await api.StoreMemory(store_request(user, "drinks coffee", older, **fields), timeout=60)
    change = pb.Memory(id=fresh, user_id=user, content="drinks water", agent_id=agent)
    mask = field_mask_pb2.FieldMask(paths=["content", "agent_id"])
    request = pb.UpdateMemoryRequest(memory=change, update_mask=mask, request_id=f"change {user}")
    await api.UpdateMemory(request, timeout=60)
    await api.ListMemoryVersions(pb.ListMemoryVersionsRequest(id=fresh, user_id=user), timeout=60)
    mine = pb.Comparison(field="agent_id", operator=pb.OPERATOR_EQ)
    mine.value.string_value = agent
    for level in (pb.READ_LEVEL_STRONG, pb.READ_LEVEL_EVENTUAL):
        read = pb.ReadOptions(level=level)
        # A replica may not have it yet.
        for request_by_id in (pb.GetMemoryRequest(id=fresh, user_id=user), pb.GetMemoryRequest(id=older)):
            request_by_id.read.CopyFrom(read)
            with suppress(grpc.aio.AioRpcError):
                await api.GetMemory(request_by_id, timeout=60)
        filtered = pb.Filter(comparison=mine)
        await api.ListMemories(pb.ListMemoriesRequest(user_id=user, filter=filtered, read=read), timeout=60)
        for mode in (pb.SEARCH_MODE_SEMANTIC, pb.SEARCH_MODE_KEYWORD):
            search = pb.SearchMemoriesRequest(user_id=user, query=f"{user} tea", mode=mode, read=read, filter=filtered)
            await api.SearchMemories(search, timeout=60)
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
        await api.GetMemory(pb.GetMemoryRequest(id=user), timeout=60)
    await api.DeleteMemory(pb.DeleteMemoryRequest(id=fresh, user_id=user, request_id=f"delete {user}"), timeout=60)
    await api.EraseUser(pb.EraseUserRequest(user_id=user, request_id=f"erase {user}"), timeout=60)


async def series_of(cluster: LocalCluster) -> set[Series]:
    """All series of all services."""
    ports = cluster.plan().record.ports
    services = [name.removesuffix("-metrics") for name in ports if name.endswith("-metrics")]
    return {
        (service, sample.name, frozenset(sample.labels.items()))
        for service in services
        for family in (await families_of(cluster, service)).values()
        for sample in family.samples
    }


async def test_the_hot_user_is_named_to_whoever_asks_for_names_and_hashed_to_others(
    cluster: LocalCluster, api: "MemoryServiceAsyncStub", user: str
) -> None:
    for _ in range(300):
        await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    token = credentials(cluster.layout.admin_token.read_text().strip())
    address = f"127.0.0.1:{cluster.plan().record.ports['router-0-admin']}"
    async with grpc.aio.insecure_channel(address) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        hashed = await stub.GetHotUsers(cluster_pb2.GetHotUsersRequest(most=100), metadata=token)
        named = await stub.GetHotUsers(cluster_pb2.GetHotUsersRequest(most=100, names=True), metadata=token)
        assert user not in str(hashed)
        (hot,) = [found for found in named.users if found.user == user and found.operation == "ListMemories"]
        assert 300 <= hot.calls <= 300 + hot.too_many
        assert hot.shard_id
        assert len(hashed.users) == len(named.users) <= 100
        await api.EraseUser(pb.EraseUserRequest(user_id=user))
        named = await stub.GetHotUsers(cluster_pb2.GetHotUsersRequest(most=100, names=True), metadata=token)
        assert user not in str(named)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetHotUsers(cluster_pb2.GetHotUsersRequest())
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_page_answers_while_a_router_is_busy_and_both_formats_are_there(cluster: LocalCluster) -> None:
    text = await page_of(cluster, "router-0")
    assert text.endswith("# EOF\n")
    assert "memory_operations_total" in await names_of(cluster)
