"""Traces of an embedded cluster, as a receiver of OTLP sees them: one from the agent's call through to the statements.

The cluster and its users write a marker wherever a user can; it is then looked for in everything that comes out.
"""

import os
import secrets
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
import pytest_asyncio

from common.topology import Topology
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.metrics import page_of
from tests.support.otlp import Node, OtlpReceiver, Received
from tests.support.wire import memory_service, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

ROUTER, SHARD = "memshard-router", "memshard-shard"
PUBLIC, INTERNAL = "memshard.v1.MemoryService", "memshard.internal.v1.ShardService"
SHARDS = ("shard-0", "shard-1", "shard-2")
EVENTUAL = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)


@dataclass(frozen=True)
class Traced:
    """A cluster whose traces come here."""

    cluster: LocalCluster
    receiver: OtlpReceiver
    api: "MemoryServiceAsyncStub"


class Caller:
    """An agent that has a trace of its own."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace_id = secrets.token_hex(16)
        self.span_id = secrets.token_hex(8)
        self.metadata = (("traceparent", f"00-{self.trace_id}-{self.span_id}-{'01' if sampled else '00'}"),)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def traced() -> AsyncIterator[Traced]:
    async with OtlpReceiver() as receiver:
        with receiver.environment():
            cluster = LocalCluster(shards=3, replicas=1, options=["--hung-after", "0"])
            await cluster.__aenter__()
        try:
            async with memory_service(cluster.address) as api:
                yield Traced(cluster, receiver, api)
        finally:
            await cluster.__aexit__(None, None, None)


def server(service: str, rpc: str, *children: Node) -> Node:
    return Node(service, f"{PUBLIC if service == ROUTER else INTERNAL}/{rpc}", children)


def asked(rpc: str, *statements: str) -> Node:
    """One call of a router to a shard, with what the shard did for it."""
    of_shard = server(SHARD, rpc, *(Node(SHARD, statement) for statement in statements))
    return Node(ROUTER, f"{INTERNAL}/{rpc}", (of_shard,))


async def test_a_search_of_all_users_is_one_tree_with_a_branch_for_each_shard(traced: Traced) -> None:
    caller = Caller()
    strong = pb.ReadOptions(level=pb.READ_LEVEL_STRONG)
    request = pb.SearchMemoriesRequest(query="what do people drink?", read=strong)
    await traced.api.SearchMemories(request, metadata=caller.metadata)
    branches = tuple(Node(ROUTER, f"ask {shard}", (asked("Search", "SELECT memories"),)) for shard in SHARDS)
    expected = server(ROUTER, "SearchMemories", Node(ROUTER, "embed"), Node(ROUTER, "fan-out", branches))
    await eventually(lambda: traced.receiver.tree(caller.trace_id, caller.span_id) == (expected,))
    spans = traced.receiver.of_trace(caller.trace_id)
    (root,) = [found for found in spans if found.span.name == f"{PUBLIC}/SearchMemories"]
    assert root.attributes["memshard.degradation.level"] == "normal"
    assert {found.attributes["memshard.shard"] for found in spans if found.span.name.startswith("ask ")} == set(SHARDS)
    (statement, *_) = [found for found in spans if found.span.name == "SELECT memories"]
    assert statement.attributes == {
        "db.system.name": "postgresql",
        "db.operation.name": "SELECT",
        "db.collection.name": "memories",
        "db.query.summary": "SELECT memories",
    }


async def test_a_store_shows_its_statement_and_a_user_that_is_hashed(traced: Traced, user: str) -> None:
    caller = Caller()
    memory = pb.Memory(user_id=user, content="Alice drinks green tea", agent_id="barista")
    await traced.api.StoreMemory(pb.StoreMemoryRequest(memory=memory), metadata=caller.metadata)

    def statements() -> list[Received]:
        spans = traced.receiver.of_trace(caller.trace_id)
        return [found for found in spans if found.span.name == "INSERT memories"]

    await eventually(statements)
    (root,) = await eventually(
        lambda: [f for f in traced.receiver.of_trace(caller.trace_id) if f.span.name == f"{PUBLIC}/StoreMemory"]
    )
    assert root.attributes["gen_ai.agent.id"] == "barista"
    assert len(root.attributes["enduser.pseudo.id"]) == 16
    assert user not in root.attributes["enduser.pseudo.id"]


async def test_a_retry_is_an_event_and_its_failure_keeps_a_trace_that_was_not_sampled(traced: Traced) -> None:
    topology = await topology_of(traced.cluster.catalog_dsn())
    user = next(u for u in (f"user-{uuid.uuid4()}" for _ in range(100)) if on(topology, u) == "shard-1")
    caller = Caller(sampled=False)
    memory = pb.Memory(user_id=user, content="Bob drinks coffee")
    dead = traced.cluster.kill("shard-1")
    # Whether the last of its attempts finds the shard there again is not what this is about.
    with suppress(grpc.aio.AioRpcError):
        await traced.api.StoreMemory(pb.StoreMemoryRequest(memory=memory), metadata=caller.metadata, timeout=30)

    def retries() -> list[str]:
        spans = traced.receiver.of_trace(caller.trace_id)
        return [event.name for found in spans for event in found.span.events]

    assert "retry" in await eventually(retries)
    attempts = [f for f in traced.receiver.of_trace(caller.trace_id) if f.span.name == f"{INTERNAL}/Store"]
    assert len(attempts) >= 2
    assert any(found.attributes.get("error.type") == "OUTCOME_UNKNOWN" or found.span.status.code for found in attempts)
    await eventually(lambda: traced.cluster.pid("shard-1") != dead)
    await eventually(traced.cluster.healthy, within_s=60)


async def test_a_hedge_is_an_event_and_both_servers_are_in_the_tree(traced: Traced) -> None:
    topology = await topology_of(traced.cluster.catalog_dsn())
    user = next(u for u in (f"user-{uuid.uuid4()}" for _ in range(100)) if on(topology, u) == "shard-0")
    request = pb.ListMemoriesRequest(user_id=user, read=EVENTUAL)
    # Before a hedge is thought of, it must be known how long reads take.
    for _ in range(200):
        await traced.api.ListMemories(request, timeout=10)
    caller = Caller()
    stopped = traced.cluster.kill("shard-0-replica-1", signal.SIGSTOP)
    try:
        await traced.api.ListMemories(request, metadata=caller.metadata, timeout=10)
    finally:
        os.kill(stopped, signal.SIGCONT)

    def servers() -> dict[str, bool]:
        spans = traced.receiver.of_trace(caller.trace_id)
        calls = [found for found in spans if (found.service, found.span.name) == (ROUTER, f"{INTERNAL}/List")]
        return {f.attributes["memshard.server"]: bool(f.attributes.get("memshard.abandoned")) for f in calls}

    assert await eventually(servers) == {"shard-0": False, "shard-0/shard-0-replica-1": True}
    spans = traced.receiver.of_trace(caller.trace_id)
    assert "hedge" in [event.name for found in spans for event in found.span.events]
    await eventually(traced.cluster.healthy, within_s=60)


async def test_what_users_store_is_in_no_output(traced: Traced) -> None:
    """A marker in every field that a caller fills, in what succeeds and in what fails, and then everywhere."""
    marker = f"marker{secrets.token_hex(8)}"
    caller = Caller()

    def memory() -> pb.Memory:
        made = pb.Memory(user_id=f"u-{marker}", content=f"content {marker}", session_id=f"s-{marker}")
        made.metadata.update({marker: marker})
        return made

    stored = await traced.api.StoreMemory(pb.StoreMemoryRequest(memory=memory()), metadata=caller.metadata)
    wrong = memory()
    wrong.embedding.extend([0.1, 0.2])
    bad = pb.StoreMemoryRequest(memory=wrong)
    search = pb.SearchMemoriesRequest(user_id=f"u-{marker}", query=f"query {marker}")
    for call in (
        traced.api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=[memory()] * 3), metadata=caller.metadata),
        traced.api.SearchMemories(search, metadata=caller.metadata),
        traced.api.GetMemory(pb.GetMemoryRequest(id=stored.memory.id, user_id=f"u-{marker}"), metadata=caller.metadata),
    ):
        await call
    for failing in (
        traced.api.StoreMemory(bad, metadata=caller.metadata),
        traced.api.GetMemory(pb.GetMemoryRequest(id=marker), metadata=caller.metadata),
    ):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            await failing
    await eventually(lambda: len(traced.receiver.of_trace(caller.trace_id)) > 10)
    names = ["router-0", *SHARDS, *(f"{shard}-replica-1" for shard in SHARDS)]
    pages = [await page_of(traced.cluster, name) for name in names]
    services = [file for file in traced.cluster.layout.logs.glob("*.log*") if not file.name.startswith("postgres")]
    assert services
    for text in (
        *pages,
        *(file.read_text() for file in services),
        *(raw.decode("latin-1") for raw in traced.receiver.raw),
    ):
        assert marker not in text


def on(topology: Topology, user: str) -> str:
    """The shard of a user."""
    return topology.owner(user_slot(user)).shard_id
