"""Traces of an embedded cluster, as a receiver of OTLP sees them: one from the agent's call through to the statements.

The cluster and its users write a marker wherever a user can; it is then looked for in everything that comes out.
"""

import asyncio
import os
import secrets
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest_asyncio
from google.protobuf import field_mask_pb2
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from opentelemetry.proto.trace.v1 import trace_pb2
from redis.asyncio import Redis

from common.topology import Topology
from local.cluster import metrics_of
from memshard.v1 import memory_pb2 as pb
from router.balance import PRIMARY
from tests.support.cluster import PATIENT_WITH_REDIS, LocalCluster
from tests.support.eventually import eventually
from tests.support.metrics import page_of, total_of
from tests.support.otlp import Node, OtlpReceiver, Received, values_of
from tests.support.replay import replay_paused
from tests.support.traced import receiving_traces
from tests.support.wire import memory_service, store_request, topology_of, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

ROUTER, SHARD = "memshard-router", "memshard-shard"
PUBLIC, INTERNAL = "memshard.v1.MemoryService", "memshard.internal.v1.ShardService"
SHARDS = ("shard-0", "shard-1", "shard-2")
SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
EVENTUAL = pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)
STRONG = pb.ReadOptions(level=pb.READ_LEVEL_STRONG)
EVERYBODYS = pb.SearchMemoriesRequest(query="what do people drink?", read=STRONG)
"""Asks the primaries of all shards."""


@dataclass(frozen=True)
class Traced:
    """A cluster whose traces come here."""

    cluster: LocalCluster
    receiver: OtlpReceiver
    api: "MemoryServiceAsyncStub"

    async def comes(self, caller: "Caller", expected: Node) -> None:
        """Returns once this is all that there is of the caller's trace."""
        below = caller.span_id
        with suppress(AssertionError):
            await eventually(lambda: self.receiver.tree(caller.trace_id, below) == (expected,))
        assert self.receiver.tree(caller.trace_id, below) == (expected,)

    async def all_came(self) -> None:
        """Returns once all spans of what has ended are here: services send them in order, and a later call's are."""
        later = Caller()
        await self.api.SearchMemories(EVERYBODYS, metadata=later.metadata)
        await eventually(lambda: len(self.named(later, "SELECT memories")) == len(SHARDS))
        await eventually(lambda: self.named(later, f"{PUBLIC}/SearchMemories"))

    def named(self, caller: "Caller", name: str) -> list[Received]:
        """The spans with this name, of the caller's trace."""
        return [found for found in self.receiver.of_trace(caller.trace_id) if found.span.name == name]

    def events(self, caller: "Caller", event: str) -> list[tuple[Received, dict[str, Any]]]:
        """The spans of the caller's trace that have such an event, and its attributes."""
        spans = self.receiver.of_trace(caller.trace_id)
        return [(found, values_of(had.attributes)) for found in spans for had in found.span.events if had.name == event]


class Caller:
    """An agent that has a trace of its own."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace_id = secrets.token_hex(16)
        self.span_id = secrets.token_hex(8)
        self.metadata = (("traceparent", f"00-{self.trace_id}-{self.span_id}-{'01' if sampled else '00'}"),)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def traced() -> AsyncIterator[Traced]:
    cluster = LocalCluster(shards=3, replicas=1, options=["--hung-after", "0"], environment=PATIENT_WITH_REDIS)
    async with receiving_traces(cluster) as receiver, memory_service(cluster.address) as api:
        yield Traced(cluster, receiver, api)


def server(service: str, rpc: str, *children: Node) -> Node:
    return Node(service, f"{PUBLIC if service == ROUTER else INTERNAL}/{rpc}", children)


def asked(rpc: str, *statements: str) -> Node:
    """One call of a router to a shard, with what the shard did for it."""
    of_shard = server(SHARD, rpc, *(Node(SHARD, statement) for statement in statements))
    return Node(ROUTER, f"{INTERNAL}/{rpc}", (of_shard,))


async def test_a_search_of_all_users_is_one_tree_with_a_branch_for_each_shard(traced: Traced) -> None:
    caller = Caller()
    await traced.api.SearchMemories(EVERYBODYS, metadata=caller.metadata)
    branches = tuple(Node(ROUTER, f"ask {shard}", (asked("Search", "SELECT memories"),)) for shard in SHARDS)
    expected = server(ROUTER, "SearchMemories", Node(ROUTER, "embed"), Node(ROUTER, "fan-out", branches))
    await traced.all_came()
    assert traced.receiver.tree(caller.trace_id, caller.span_id) == (expected,)
    spans = traced.receiver.of_trace(caller.trace_id)
    # And nothing of this trace is anywhere else.
    assert len(spans) == expected.size == 15
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


async def test_a_look_by_id_alone_shows_what_redis_knew_and_what_was_asked_then(traced: Traced, user: str) -> None:
    """The ids are old ones, of which a store keeps no location: this router knows nothing of them."""
    unknown, known = str(uuid.uuid4()), str(uuid.uuid4())
    for memory_id in (unknown, known):
        await traced.api.StoreMemory(store_request(user, "Alice drinks green tea", memory_id))
    async with Redis.from_url(traced.cluster.redis_url()) as redis:
        # As another router would, to which somebody came with this id.
        await redis.set(f"loc:{known}", str(user_slot(user)))
    read = asked("Get", "SELECT memories")
    everywhere = Node(ROUTER, "fan-out", tuple(Node(ROUTER, f"ask {shard}", (read,)) for shard in SHARDS))
    redis_asked = Node(ROUTER, "look into Redis")
    for memory_id, children, of_redis, of_call in (
        (unknown, (everywhere, redis_asked), [False], False),
        (unknown, (read,), [], True),
        (known, (redis_asked, read), [True], True),
    ):
        caller = Caller()
        await traced.api.GetMemory(pb.GetMemoryRequest(id=memory_id), metadata=caller.metadata)
        expected = server(ROUTER, "GetMemory", *children)
        await traced.comes(caller, expected)
        (root,) = traced.named(caller, f"{PUBLIC}/GetMemory")
        assert root.attributes["memshard.cache.hit"] is of_call
        looks = traced.named(caller, "look into Redis")
        assert [look.attributes["memshard.cache.hit"] for look in looks] == of_redis
        assert all(look.attributes["memshard.cache.layer"] == "redis" for look in looks)


async def test_a_retry_is_an_event_and_its_failure_keeps_a_trace_that_was_not_sampled(traced: Traced) -> None:
    topology = await topology_of(traced.cluster.catalog_dsn())
    user = next(u for u in (f"user-{uuid.uuid4()}" for _ in range(100)) if on(topology, u) == "shard-1")
    storing, searching = Caller(sampled=False), Caller(sampled=False)
    memory = pb.Memory(user_id=user, content="Bob drinks coffee")
    search = pb.SearchMemoriesRequest(query="coffee", read=STRONG)
    dead = traced.cluster.kill("shard-1")
    # Whether the last of its attempts finds the shard there again is not what this is about.
    with suppress(grpc.aio.AioRpcError):
        await asyncio.gather(
            traced.api.StoreMemory(pb.StoreMemoryRequest(memory=memory), metadata=storing.metadata, timeout=30),
            traced.api.SearchMemories(search, metadata=searching.metadata, timeout=30),
            return_exceptions=True,
        )
    for caller, holder, rpc in (
        (storing, f"{PUBLIC}/StoreMemory", f"{INTERNAL}/Store"),
        (searching, "ask shard-1", f"{INTERNAL}/Search"),
    ):
        retries = await eventually(partial(traced.events, caller, "retry"))
        assert {found.span.name for found, _ in retries} == {holder}
        (span,) = {found.span.span_id for found, _ in retries}
        assert [values["memshard.attempt"] for _, values in retries] == list(range(2, len(retries) + 2))
        assert all(values["error.type"] and values["memshard.retry.delay_ms"] >= 0 for _, values in retries)
        # A breaker that has opened meanwhile refuses what would have been an attempt.
        attempts = [found for found in traced.named(caller, rpc) if found.span.parent_span_id == span]
        assert 1 <= len(attempts) <= len(retries) + 1
        assert {found.attributes["memshard.server"] for found in attempts} == {"shard-1"}
        first = min(attempts, key=lambda found: found.span.start_time_unix_nano)
        assert first.span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
        assert first.attributes["error.type"]
    attempts = traced.named(storing, f"{INTERNAL}/Store")
    assert len(attempts) >= 2
    assert any(found.attributes.get("error.type") == "OUTCOME_UNKNOWN" or found.span.status.code for found in attempts)
    await eventually(lambda: traced.cluster.pid("shard-1") != dead)
    await eventually(traced.cluster.healthy, within_s=60)


async def ready_to_hedge(traced: Traced, shard_id: str, save_up: Callable[[str], Awaitable[Any]]) -> str:
    """Returns a user of the shard, listings of whom are hedged from now on. `save_up` reads something of another user
    that is read nowhere else.

    On a busy machine one listing of twenty is hedged, and so there is no leave left for another: at most one of fifty
    may be. Reads of which too little is known to hedge them earn it all the same.
    """
    topology = await topology_of(traced.cluster.catalog_dsn())
    names = [f"user-{uuid.uuid4()}" for _ in range(100)]
    user = next(name for name in names if on(topology, name) == shard_id)
    for _ in range(200):
        await traced.api.ListMemories(pb.ListMemoriesRequest(user_id=user, read=EVENTUAL), timeout=10)
    other = next(name for name in names if on(topology, name) == "shard-1")
    for _ in range(60):
        await save_up(other)
    return user


async def test_a_hedge_is_an_event_and_both_servers_are_in_the_tree(traced: Traced) -> None:
    async def listing(other: str) -> None:
        await traced.api.ListMemories(pb.ListMemoriesRequest(user_id=other, read=EVENTUAL), timeout=10)

    user = await ready_to_hedge(traced, "shard-0", listing)
    request = pb.ListMemoriesRequest(user_id=user, read=EVENTUAL)
    caller = Caller()
    stopped = traced.cluster.kill("shard-0-replica-1", signal.SIGSTOP)
    try:
        await traced.api.ListMemories(request, metadata=caller.metadata, timeout=10)
    finally:
        os.kill(stopped, signal.SIGCONT)

    def servers() -> dict[str, bool]:
        spans = traced.receiver.of_trace(caller.trace_id)
        calls = [found for found in spans if (found.service, found.span.name) == (ROUTER, f"{INTERNAL}/List")]
        # Whichever was noticed first: that nobody waits for it, that its task was ended, or that its time was up.
        given_up = ("memshard.abandoned", "memshard.cancelled", "error.type")
        return {f.attributes["memshard.server"]: any(f.attributes.get(how) for how in given_up) for f in calls}

    assert await eventually(servers) == {"shard-0": False, "shard-0/shard-0-replica-1": True}
    # Of the call that both were for, which is the span above theirs.
    ((holder, values),) = traced.events(caller, "hedge")
    assert holder.span.name == f"{PUBLIC}/ListMemories"
    assert values["memshard.server"] == PRIMARY
    assert values["memshard.after_ms"] > 0
    both = [found for found in traced.named(caller, f"{INTERNAL}/List") if found.service == ROUTER]
    assert {found.span.parent_span_id for found in both} == {holder.span.span_id}
    await eventually(traced.cluster.healthy, within_s=60)


async def test_a_read_that_is_hedged_and_tried_again_shows_both(traced: Traced) -> None:
    """Its first attempt asks both servers of the shard in vain: the replica has not replayed what is asked for, and the
    primary, which the hedge goes to, is gone. The second gets what the replica has replayed by then.
    """
    shard_id, replica = "shard-2", "shard-2/shard-2-replica-1"

    async def search(other: str) -> None:
        # One that no cache has an answer to.
        request = pb.SearchMemoriesRequest(user_id=other, query=uuid.uuid4().hex, read=EVENTUAL)
        await traced.api.SearchMemories(request, timeout=10)

    user = await ready_to_hedge(traced, shard_id, search)
    metrics_port = traced.cluster.plan().record.ports[metrics_of("router-0")]
    caller = Caller()
    async with AsyncExitStack() as paused:
        await paused.enter_async_context(replay_paused(traced.cluster, shard_id))
        stored = await traced.api.StoreMemory(store_request(user, "Carol drinks mate"))
        read = pb.ReadOptions(level=pb.READ_LEVEL_SESSION, consistency_tokens=[stored.receipt.consistency_token])
        request = pb.ListMemoriesRequest(user_id=user, read=read)
        before = await total_of(metrics_port, "memory_retries")
        dead = traced.cluster.kill(shard_id)
        listing = asyncio.ensure_future(traced.api.ListMemories(request, metadata=caller.metadata, timeout=20))

        async def tried_again() -> bool:
            # Going on to the replica, after the primary had failed, was the first.
            return await total_of(metrics_port, "memory_retries") > before + 1

        await eventually(tried_again)
    listed = await listing
    assert [memory.id for memory in listed.memories] == [stored.memory.id]
    await eventually(lambda: traced.cluster.pid(shard_id) != dead)
    await eventually(traced.cluster.healthy, within_s=60)
    await traced.all_came()
    (root,) = traced.named(caller, f"{PUBLIC}/ListMemories")
    happened = [(event.name, values_of(event.attributes)) for event in root.span.events]
    assert [name for name, _ in happened][:2] == ["hedge", "retry"]
    (_, hedge), (_, retry) = happened[:2]
    assert hedge["memshard.server"] == PRIMARY
    assert (retry["memshard.attempt"], retry["error.type"]) == (2, "NO_FRESH_SERVER")
    # No other span has such events, and all attempts are the call's children.
    holders = {found.span.span_id for what in ("hedge", "retry") for found, _ in traced.events(caller, what)}
    assert holders == {root.span.span_id}
    attempts = [found for found in traced.named(caller, f"{INTERNAL}/List") if found.service == ROUTER]
    assert {found.span.parent_span_id for found in attempts} == {root.span.span_id}
    retried_at = root.span.events[1].time_unix_nano
    in_vain = [found for found in attempts if found.span.start_time_unix_nano < retried_at]
    assert [found.attributes["memshard.server"] for found in by_start(in_vain)] == [replica, shard_id, replica]
    assert all(found.attributes["error.type"] for found in in_vain)
    assert any("error.type" not in found.attributes for found in attempts)


def by_start(spans: list[Received]) -> list[Received]:
    """In the order in which they began."""
    return sorted(spans, key=lambda found: found.span.start_time_unix_nano)


async def test_what_callers_send_is_in_no_output(traced: Traced, user: str) -> None:
    """A marker in every text that a request has, one at a time, in what succeeds and in what fails, is then looked for.

    An agent's id may be in a span, under its name.
    """
    marker, agent, number = f"marker{secrets.token_hex(8)}", f"agent{secrets.token_hex(8)}", 0.76543213
    caller = Caller()
    headers = (*caller.metadata, ("tracestate", f"a={marker}"), ("authorization", f"Bearer {marker}"))
    garbled = (*caller.metadata, ("tracestate", f"{marker} likes tea"))
    stored = await traced.api.StoreMemory(store_request(user, f"content {marker}"), metadata=headers)
    requests = requests_of(user, stored.memory.id)
    assert requests.keys() == {rpc.name for rpc in SERVICE.methods}
    outcomes: Counter[str] = Counter()
    sent: set[str] = set()
    for rpc, plain in requests.items():
        for path in texts(SERVICE.methods_by_name[rpc].input_type):
            # With a tracestate that travels, and with one that does not.
            for metadata in (headers, garbled):
                outcomes[await outcome(traced, rpc, marked(plain, path, marker, agent), metadata)] += 1
            sent.add(f"{rpc} {'.'.join(path)}")
    for rpc, request in rich_requests(user, marker, agent, number):
        outcomes[await outcome(traced, rpc, request, headers)] += 1
    assert sent >= {
        "StoreMemory memory.content",
        "BatchStoreMemories memories.session_id",
        "UpdateMemory request_id",
        "UpdateMemory update_mask.paths",
        "ListMemories page_token",
        "SearchMemories filter.comparison.value.string_value",
        "SearchMemories read.consistency_tokens",
        "EraseUser user_id",
    }
    assert outcomes["OK"] >= 20, outcomes
    assert outcomes["INVALID_ARGUMENT"] >= 20, outcomes
    assert not outcomes.keys() & {"INTERNAL", "UNKNOWN"}, outcomes
    await eventually(lambda: len(traced.receiver.of_trace(caller.trace_id)) > sum(outcomes.values()))
    names = ["router-0", *SHARDS, *(f"{shard}-replica-1" for shard in SHARDS)]
    pages = [await page_of(traced.cluster, name) for name in names]
    logs = [*traced.cluster.layout.logs.glob("*.log*")]
    assert {file.name.partition("-")[0].partition(".")[0] for file in logs} >= {"postgres", "redis", "router", "shard"}
    written = [*pages, *(file.read_text(errors="replace") for file in logs)]
    for text in (*written, *(raw.decode("latin-1") for raw in traced.receiver.raw)):
        assert marker not in text
        assert str(number)[:8] not in text
    assert agent not in "".join(written)
    agents = 0
    for found in traced.receiver.received:
        kept = [item for item in found.span.attributes if item.key != "gen_ai.agent.id"]
        agents += len(found.span.attributes) - len(kept)
        rest = trace_pb2.Span()
        rest.CopyFrom(found.span)
        del rest.attributes[:]
        rest.attributes.extend(kept)
        assert agent not in str(rest)
    assert agents >= 3


def requests_of(user: str, memory_id: str) -> dict[str, Message]:
    """A request of each rpc that would be answered."""
    memory = pb.Memory(user_id=user, content="tea")
    change = pb.Memory(user_id=user, id=memory_id, content="coffee")
    mask = field_mask_pb2.FieldMask(paths=["content"])
    return {
        "StoreMemory": pb.StoreMemoryRequest(memory=memory),
        "BatchStoreMemories": pb.BatchStoreMemoriesRequest(memories=[memory]),
        "GetMemory": pb.GetMemoryRequest(id=memory_id),
        "UpdateMemory": pb.UpdateMemoryRequest(memory=change, update_mask=mask),
        "ListMemories": pb.ListMemoriesRequest(user_id=user),
        "ListMemoryVersions": pb.ListMemoryVersionsRequest(id=memory_id, user_id=user),
        "SearchMemories": pb.SearchMemoriesRequest(user_id=user, query="tea"),
        "DeleteMemory": pb.DeleteMemoryRequest(id=str(uuid.uuid4()), user_id=user),
        "EraseUser": pb.EraseUserRequest(user_id=f"{user} who is erased"),
    }


def rich_requests(user: str, marker: str, agent: str, number: float) -> Iterator[tuple[str, Message]]:
    """What has its text in maps, which no path leads to; and numbers."""
    memory = pb.Memory(user_id=f"{user}-{marker}", content=marker, agent_id=agent, session_id=marker)
    memory.metadata.update({marker: {marker: [marker]}})
    has = pb.Comparison(field=f"metadata.{marker}", operator=pb.OPERATOR_EQ)
    has.value.string_value = marker
    either = pb.Filter(any_of=pb.FilterList(filters=[pb.Filter(comparison=has), pb.Filter(comparison=has)]))
    yield "StoreMemory", pb.StoreMemoryRequest(memory=memory)
    yield "BatchStoreMemories", pb.BatchStoreMemoriesRequest(memories=[memory] * 3)
    for mode in pb.SearchMode.values():
        yield "SearchMemories", pb.SearchMemoriesRequest(user_id=memory.user_id, query=marker, filter=either, mode=mode)
    yield "ListMemories", pb.ListMemoriesRequest(user_id=memory.user_id, filter=pb.Filter(negation=either))
    yield "EraseUser", pb.EraseUserRequest(user_id=memory.user_id, request_id=marker)
    for embedding in ([number] * 2, [number] * 256, [number] * 384):
        memory.embedding[:] = embedding
        yield "StoreMemory", pb.StoreMemoryRequest(memory=memory)
        yield "SearchMemories", pb.SearchMemoriesRequest(user_id=user, embedding=embedding)


def texts(kind: Descriptor, above: tuple[Descriptor, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a message of this kind may have text or bytes. A kind within itself has none that is not there already, and
    maps are left out."""
    for field in kind.fields:
        if field.type in {field.TYPE_STRING, field.TYPE_BYTES}:
            yield (field.name,)
        below = field.message_type
        if below is not None and below not in (*above, kind) and not below.GetOptions().map_entry:
            for path in texts(below, (*above, kind)):
                yield (field.name, *path)


def marked(plain: Message, path: tuple[str, ...], marker: str, agent: str) -> Message:
    """The same with a marker at the end of the path."""
    made = type(plain)()
    made.CopyFrom(plain)
    at: Any = made
    for name in path[:-1]:
        at = getattr(at, name)
        if not isinstance(at, Message):
            at = at[0] if len(at) else at.add()
    field = at.DESCRIPTOR.fields_by_name[path[-1]]
    text = agent if field.name == "agent_id" else marker
    value = text.encode() if field.type == field.TYPE_BYTES else text
    if isinstance(getattr(at, field.name), str | bytes):
        setattr(at, field.name, value)
    else:
        getattr(at, field.name).append(value)
    return made


async def outcome(traced: Traced, rpc: str, request: Message, metadata: tuple[tuple[str, str], ...]) -> str:
    """The status of a call."""
    try:
        await getattr(traced.api, rpc)(request, metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def on(topology: Topology, user: str) -> str:
    """The shard of a user."""
    return topology.owner(user_slot(user)).shard_id
