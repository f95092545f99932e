"""`memshard status`: asks every process itself, so it is right whatever became of the supervisor."""

import asyncio
from collections.abc import Sequence

from pydantic import BaseModel

from common import catalog
from common.catalog import CatalogError
from common.postgres import CONNECT_ERRORS, DatabaseUnreachableError, connect
from local import probes
from local.cluster import CATALOG_SERVER, REDIS, Plan
from local.layout import Layout
from local.postgres import Server
from local.probes import Answer
from local.record import load_record, load_secrets
from local.state import AUTO, ProcessState, Role, ShardState, State, TopologyState, load_state
from memshard.v1.memory_pb2 import Durability

CATALOG_TIMEOUT_S = 2.0


class ProcessStatus(BaseModel):
    """One process. `pid` is null while it does not run, `port` where it has none."""

    name: str
    role: Role
    shard_id: str | None
    pid: int | None
    port: int | None
    healthy: bool


class ReplicaStatus(BaseModel):
    """How far a replica service is: all null when it does not say."""

    name: str
    timeline: int | None = None
    lag_bytes: int | None = None
    lag_ms: int | None = None


class ShardStatus(BaseModel):
    """One shard. `primary` is the server that takes its writes now, null when none does; `address` its service's.

    `durability` is what a write would be acknowledged with now, null when the service does not say. `level` is the
    degradation level that an operator has set, or `auto`.
    """

    shard_id: str
    status: str
    slots: int
    primary: str | None
    replicas: list[str]
    address: str
    durability: str | None
    replication: list[ReplicaStatus]
    level: str


class ClusterStatus(BaseModel):
    """The cluster. `epoch`, `shards` and `level`, what an operator has set for the whole, come from the catalog, or are
    the last known ones; `catalog` says which."""

    epoch: int | None
    processes: list[ProcessStatus]
    shards: list[ShardStatus]
    catalog: str
    data_dir: str
    addresses: list[str]
    level: str = AUTO

    def healthy(self) -> bool:
        """Whether everything is."""
        return bool(self.processes) and all(process.healthy for process in self.processes)

    def runs(self) -> bool:
        """Whether anything does."""
        return any(process.pid is not None for process in self.processes)


async def status(layout: Layout) -> ClusterStatus:
    """What runs, and how it is. Raises LocalClusterError when the directory's files cannot be read."""
    state = load_state(layout)
    plan = _plan(layout, state)
    if plan is None:
        return ClusterStatus(
            epoch=None, processes=[], shards=[], catalog="none", data_dir=str(layout.root), addresses=[]
        )
    asked = [_ask(plan, process) for process in _expected(plan, state)]
    topology, processes = await asyncio.gather(_topology(plan), asyncio.gather(*asked))
    last = topology or state.topology
    shards = await asyncio.gather(*(_shard(shard, processes) for shard in (last.shards if last else ())))
    return ClusterStatus(
        epoch=last.epoch if last else None,
        processes=processes,
        shards=shards,
        catalog="live" if topology else "last known" if last else "unknown",
        data_dir=str(layout.root),
        addresses=state.addresses,
        level=last.level if last else AUTO,
    )


def _plan(layout: Layout, state: State) -> Plan | None:
    """What the cluster consists of; None when there is none, or it was never finished."""
    if not layout.exists() or not layout.secrets.exists():
        return None
    routers = tuple(p.port for p in state.processes if p.role == "router" and p.port is not None)
    return Plan(layout, load_record(layout), load_secrets(layout), routers)


def _expected(plan: Plan, state: State) -> list[ProcessState]:
    """Every process that there should be, running or not."""
    record = plan.record

    def process(name: str, role: Role, shard_id: str | None = None) -> ProcessState:
        return ProcessState(name=name, role=role, shard_id=shard_id, port=record.ports.get(name))

    expected = [ProcessState(name="supervisor", role="supervisor"), process(CATALOG_SERVER, "postgres-primary")]
    for shard_id in record.shard_ids():
        first, *others = record.server_names(shard_id)
        expected.append(process(first, "postgres-primary", shard_id))
        expected += [process(name, "postgres-standby", shard_id) for name in others]
    expected.append(process(REDIS, "redis"))
    for shard_id in record.shard_ids():
        expected.append(process(shard_id, "shard", shard_id))
        expected += [process(name, "replica", shard_id) for name in record.replica_names(shard_id)]
    known = {process.name: process for process in state.processes}
    routers = [process for process in state.processes if process.role == "router"]
    return [*(known.get(process.name, process) for process in expected), *routers]


async def _ask(plan: Plan, process: ProcessState) -> ProcessStatus:
    lives = probes.lives(process.pid, process.created_at)
    told = ProcessStatus(
        name=process.name,
        role=process.role,
        shard_id=process.shard_id,
        pid=process.pid if lives else None,
        port=process.port,
        healthy=False,
    )
    if not lives:
        return told
    if process.role in ("postgres-primary", "postgres-standby") and process.shard_id:
        return await _ask_server(plan, told, plan.shard_servers(process.shard_id)[process.name])
    return told.model_copy(update={"healthy": await _probe(plan, process)})


async def _ask_server(plan: Plan, told: ProcessStatus, server: Server) -> ProcessStatus:
    """One of a shard's servers, with the role that it has now. A standby is healthy when it follows its primary."""
    answer = await probes.ask_role(server.app_dsn(plan.secrets))
    if answer is None:
        return told
    role = "postgres-standby" if answer.is_standby else "postgres-primary"
    return told.model_copy(update={"role": role, "healthy": answer.streams or not answer.is_standby})


async def _probe(plan: Plan, process: ProcessState) -> bool:
    if process.port is None:
        return True
    if process.role == "redis":
        return await probes.answers_ping(plan.redis_url())
    if process.name == CATALOG_SERVER:
        return await probes.ask_postgres(plan.catalog_server().app_dsn(plan.secrets)) is Answer.UP
    return await probes.serves(process.port)


async def _shard(shard: ShardState, processes: Sequence[ProcessStatus]) -> ShardStatus:
    """A shard of the topology, with what its processes say of it."""
    of_shard = [process for process in processes if process.shard_id == shard.shard_id]
    primary = next((p.name for p in of_shard if p.role == "postgres-primary" and p.healthy), None)
    service = next((p for p in of_shard if p.role == "shard"), None)
    replicas = [p for p in of_shard if p.role == "replica"]
    durability, replication = await asyncio.gather(_durability(service), asyncio.gather(*map(_replication, replicas)))
    return ShardStatus(
        shard_id=shard.shard_id,
        status=shard.status,
        slots=shard.slots,
        primary=primary,
        replicas=[replica.name for replica in replicas],
        address=shard.address,
        durability=durability,
        replication=replication,
        level=shard.level,
    )


async def _durability(service: ProcessStatus | None) -> str | None:
    if service is None or service.pid is None or service.port is None:
        return None
    told = await probes.describe(service.port)
    if told is None or told.durability == Durability.DURABILITY_UNSPECIFIED:
        return None
    return Durability.Name(told.durability).removeprefix("DURABILITY_")


async def _replication(replica: ProcessStatus) -> ReplicaStatus:
    told = None if replica.pid is None or replica.port is None else await probes.describe(replica.port)
    if told is None:
        return ReplicaStatus(name=replica.name)
    return ReplicaStatus(
        name=replica.name, timeline=told.position.timeline, lag_bytes=told.lag_bytes, lag_ms=told.lag_ms
    )


async def _topology(plan: Plan) -> TopologyState | None:
    """The topology from the catalog; None when that is out of reach."""
    try:
        async with asyncio.timeout(CATALOG_TIMEOUT_S):
            connection = await connect(plan.catalog_server().app_dsn(plan.secrets), what="the catalog")
            try:
                return TopologyState.of(await catalog.read_topology(connection))
            finally:
                connection.terminate()
    except (DatabaseUnreachableError, CatalogError, *CONNECT_ERRORS):
        return None
