"""A shard's servers in this process, real gRPC on free ports, that answer as the test says: what is tested is whom the
router asks, and what it does with the answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import MemshardError, OutcomeUnknown, Unavailable
from common.retry import RetryBudget
from common.rpc import methods_of
from common.topology import Replica, Shard, SlotRange, Topology
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.consistency import Consistency, Position
from router.dispatch import Dispatch
from router.fanout import Fanout
from router.probes import Probes
from router.reads import Reads
from router.replicas import Replicas
from router.retries import Retries
from router.shards import GET, STORE, Shards
from router.topology_watch import TopologyWatch
from tests.support.eventually import eventually

T = TypeVar("T")

CLUSTER_ID = "11111111-1111-1111-1111-111111111111"
_SERVICE = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
_HEALTH: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]


class Server:
    """One server of a shard. Change its attributes to change its answers."""

    def __init__(self, name: str, shard_id: str = "shard-0", *, writable: bool = False) -> None:
        self.name = name
        self.shard_id = shard_id
        self.writable = writable
        self.position = Position(1, 100)
        self.lag_ms = 0
        self.figures = shard_pb2.DescribeResponse()
        """What else it says of itself."""
        self.serving = True
        self.error: MemshardError | None = None
        self.fails_next = 0
        """How many calls fail with UNAVAILABLE before the next that does not."""
        self.loses_next = 0
        """How many writes are done, and not answered for, before the next that is."""
        self.delay_s = 0.0
        self.stored: list[bytes] = []
        self.asked: list[shard_pb2.Route] = []
        self.unembedded = 0
        """How many memories a search cannot find yet."""
        self.searched: list[shard_pb2.SearchRequest] = []
        self.answered = 0
        self.in_flight = 0
        self.looks = 0
        self._moved = asyncio.Condition()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._looked_at = asyncio.Event()
        self._looked_at.set()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()
        self._looked_at.set()
        await self.stop()

    @property
    def address(self) -> str:
        """Where it listens, also while it does not."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listens, where it listened before."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        for service in (_SERVICE, _HEALTH):
            methods_of(service, self, default_deadline_s=60).add_to(self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Goes away, like a process that is killed."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def freeze(self) -> None:
        """Takes calls, and answers none, like a process that is stopped."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Answers again."""
        self._thawed.set()

    def leave_looks_unanswered(self) -> None:
        """Answers reads, but says no more of itself: too busy for that, perhaps."""
        self._looked_at.clear()

    async def move(self, position: Position) -> None:
        """Replays up to here."""
        async with self._moved:
            self.position = position
            self._moved.notify_all()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, deadline: Deadline
    ) -> health_pb2.HealthCheckResponse:
        await self._thawed.wait()
        await self._looked_at.wait()
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self.serving else states.NOT_SERVING)

    async def Describe(  # noqa: N802
        self, request: shard_pb2.DescribeRequest, deadline: Deadline
    ) -> shard_pb2.DescribeResponse:
        await self._thawed.wait()
        self.looks += 1
        timeline, lsn = self.position
        described = shard_pb2.DescribeResponse(
            cluster_id=CLUSTER_ID,
            shard_id=self.shard_id,
            writable=self.writable and not self.figures.database_silent_ms,
            position=shard_pb2.ShardPosition(shard_id=self.shard_id, timeline=timeline, lsn=lsn),
            lag_ms=self.lag_ms,
        )
        described.MergeFrom(self.figures)
        return described

    async def Get(self, request: shard_pb2.GetRequest, deadline: Deadline) -> shard_pb2.GetResponse:  # noqa: N802
        self.asked.append(request.route)
        self.in_flight += 1
        try:
            await self._thawed.wait()
            await asyncio.sleep(self.delay_s)
            self._fail()
            await self._be_fresh(request.route)
        finally:
            self.in_flight -= 1
        self.answered += 1
        memory = pb.Memory(
            id=request.id,
            user_id=request.user_id,
            content=self.name,
            embedding_state=pb.EMBEDDING_STATE_READY,
        )
        answer = shard_pb2.GetResponse(found=[shard_pb2.FoundMemory(memory=memory)])
        if request.stamped:
            timeline, lsn = self.position
            answer.stamp.CopyFrom(shard_pb2.ReadStamp(timeline=timeline, lsn=lsn, age_ms=self.lag_ms))
        return answer

    async def Search(  # noqa: N802
        self, request: shard_pb2.SearchRequest, deadline: Deadline
    ) -> shard_pb2.SearchResponse:
        self.searched.append(request)
        self.in_flight += 1
        try:
            await self._thawed.wait()
            self._fail()
            await self._be_fresh(request.route)
        finally:
            self.in_flight -= 1
        self.answered += 1
        memory = pb.Memory(user_id=request.user_id, content=self.name, embedding_state=pb.EMBEDDING_STATE_READY)
        answer = shard_pb2.SearchResponse(
            results=[pb.ScoredMemory(memory=memory, score=0.5)], unembedded=self.unembedded
        )
        if request.stamped:
            timeline, lsn = self.position
            answer.stamp.CopyFrom(shard_pb2.ReadStamp(timeline=timeline, lsn=lsn, age_ms=self.lag_ms))
        return answer

    async def Store(self, request: shard_pb2.StoreRequest, deadline: Deadline) -> shard_pb2.StoreResponse:  # noqa: N802
        self.asked.append(request.route)
        await self._thawed.wait()
        self._fail()
        self.stored.append(request.digest)
        if self.loses_next:
            self.loses_next -= 1
            raise OutcomeUnknown("the answer is lost")
        return shard_pb2.StoreResponse(memory=request.memory)

    def _fail(self) -> None:
        if self.fails_next:
            self.fails_next -= 1
            raise Unavailable("not now", reason="DATABASE_UNAVAILABLE", retry_after_s=0.0)
        if self.error is not None:
            raise self.error

    async def _be_fresh(self, route: shard_pb2.Route) -> None:
        if not route.HasField("fresh"):
            if not self.writable:
                raise Unavailable("strong reads are for the primary", reason="NOT_PRIMARY")
            return
        wanted, behind = route.fresh, Unavailable("behind", reason="REPLICA_BEHIND")
        if wanted.max_staleness_ms and self.lag_ms > wanted.max_staleness_ms:
            raise behind
        if wanted.HasField("position"):
            position = Position(wanted.position.timeline, wanted.position.lsn)
            with suppress(TimeoutError):
                async with asyncio.timeout(wanted.wait_ms / 1000), self._moved:
                    await self._moved.wait_for(lambda: self.position >= position)
            if self.position < position:
                raise behind


@dataclass
class Router:
    """The part of a router that reads."""

    topology: Topology
    shards: Shards
    replicas: Replicas
    dispatch: Dispatch
    fanout: Fanout
    looking: "asyncio.Task[None]"
    reads: Reads
    served: list[str] = field(default_factory=list)

    async def get(self, consistency: Consistency, *, timeout_s: float = 5.0) -> str:
        """The name of the server that answered a read, which must be of the kind that the answer says."""
        request = shard_pb2.GetRequest(id="00000000-0000-0000-0000-000000000000")
        answered = await self.dispatch.read(0, GET, request, consistency, Deadline.after(timeout_s))
        (found,) = answered.answer.found
        name = found.memory.content
        assert answered.served_by == ("replica" if name.startswith("replica") else "primary")
        return name

    async def store(self, digest: bytes = b"", *, timeout_s: float = 5.0) -> None:
        """Stores something in the shard."""
        await self.dispatch.to_owner(0, STORE, shard_pb2.StoreRequest(digest=digest), Deadline.after(timeout_s))

    def known(self) -> set[str]:
        """The replicas that serve, as far as is known."""
        return {name for shard in self.topology.shards for name in self.replicas.serving(shard)}

    async def knows(self, *names: str, within_s: float = 10.0) -> None:
        """Waits until exactly these replicas are known to serve."""
        await eventually(lambda: self.known() == set(names), within_s=within_s)


def shard(primary: Server, replicas: Sequence[Server]) -> Shard:
    """The topology's word for these servers."""
    return Shard(primary.shard_id, primary.address, replicas=tuple(Replica(r.name, r.address) for r in replicas))


@asynccontextmanager
async def router(
    primary: Server, *replicas: Server, budget: RetryBudget | None = None, **settings: object
) -> AsyncIterator[Router]:
    """A router of one shard, which knows its servers. `budget` is that of its retries."""
    topology = Topology(
        CLUSTER_ID, 1, shards=(shard(primary, replicas),), ranges=(SlotRange(0, 16383, primary.shard_id),)
    )
    configured = RouterSettings(catalog_dsn="postgresql://unused", **settings)  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        shards = Shards(configured)
        stack.push_async_callback(shards.close)
        known = Replicas(shards, topology, configured)
        watch = TopologyWatch("postgresql://unused", topology, poll_s=60, changed=lambda _: None)
        retries = Retries(budget=budget)
        reads = Reads(shards, known, configured, retries)
        looking = asyncio.create_task(known.run())
        probing = asyncio.create_task(Probes(shards, watch).run())

        async def stop() -> None:
            looking.cancel()
            probing.cancel()
            await asyncio.gather(looking, probing, return_exceptions=True)

        stack.push_async_callback(stop)
        made = Router(
            topology,
            shards,
            known,
            Dispatch(watch, reads, retries),
            Fanout(watch, reads, retries, concurrency=8),
            looking,
            reads,
        )
        await made.knows(*(replica.name for replica in replicas if replica.serving and not replica.writable))
        yield made


@asynccontextmanager
async def servers(replicas: int) -> AsyncIterator[tuple[Server, list[Server]]]:
    """A primary and so many replicas."""
    async with AsyncExitStack() as stack:
        primary = await stack.enter_async_context(Server("primary", writable=True))
        others = [await stack.enter_async_context(Server(f"replica-{n}")) for n in range(replicas)]
        yield primary, others


async def apart(primary: Server, go: Callable[[], Awaitable[T]]) -> list[T]:
    """What two are answered of whom the second comes half a second after the first, while the server is at its work."""
    primary.freeze()
    first = go()
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.5
    await eventually(lambda: loop.time() > until)
    second = go()
    await asyncio.sleep(0)
    primary.thaw()
    return [await first, await second]
