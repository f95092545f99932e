"""`memshard status`: asks every process itself, so it is right whatever became of the supervisor."""

import asyncio

from pydantic import BaseModel

from common import catalog
from common.catalog import CatalogError
from common.postgres import CONNECT_ERRORS, DatabaseUnreachableError, connect
from local import probes
from local.cluster import CATALOG_SERVER, Plan, server_name
from local.layout import Layout
from local.probes import Answer
from local.record import load_record, load_secrets
from local.state import ProcessState, Role, ShardState, State, TopologyState, load_state

CATALOG_TIMEOUT_S = 2.0


class ProcessStatus(BaseModel):
    """One process. `pid` is null while it does not run, `port` where it has none."""

    name: str
    role: Role
    shard_id: str | None
    pid: int | None
    port: int | None
    healthy: bool


class ClusterStatus(BaseModel):
    """The cluster. `epoch` and `shards` come from the catalog, or are the last known ones; `catalog` says which."""

    epoch: int | None
    processes: list[ProcessStatus]
    shards: list[ShardState]
    catalog: str
    data_dir: str
    addresses: list[str]

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
    return ClusterStatus(
        epoch=last.epoch if last else None,
        processes=processes,
        shards=last.shards if last else [],
        catalog="live" if topology else "last known" if last else "unknown",
        data_dir=str(layout.root),
        addresses=state.addresses,
    )


def _plan(layout: Layout, state: State) -> Plan | None:
    """What the cluster consists of; None when there is none, or it was never finished."""
    if not layout.exists() or not layout.secrets.exists():
        return None
    routers = tuple(p.port for p in state.processes if p.role == "router" and p.port is not None)
    return Plan(layout, load_record(layout), load_secrets(layout), routers)


def _expected(plan: Plan, state: State) -> list[ProcessState]:
    """Every process that there should be, running or not."""
    ports = plan.record.ports
    shard_ids = plan.record.shard_ids()
    expected = [
        ProcessState(name="supervisor", role="supervisor"),
        ProcessState(name=CATALOG_SERVER, role="postgres-primary", port=ports[CATALOG_SERVER]),
        *(
            ProcessState(name=name, role="postgres-primary", shard_id=shard_id, port=ports[name])
            for shard_id, name in zip(shard_ids, map(server_name, shard_ids), strict=True)
        ),
        ProcessState(name="redis", role="redis", port=ports["redis"]),
        *(ProcessState(name=s, role="shard", shard_id=s, port=ports[s]) for s in shard_ids),
    ]
    known = {process.name: process for process in state.processes}
    routers = [process for process in state.processes if process.role == "router"]
    return [*(known.get(process.name, process) for process in expected), *routers]


async def _ask(plan: Plan, process: ProcessState) -> ProcessStatus:
    lives = probes.lives(process.pid, process.created_at)
    return ProcessStatus(
        name=process.name,
        role=process.role,
        shard_id=process.shard_id,
        pid=process.pid if lives else None,
        port=process.port,
        healthy=lives and await _probe(plan, process),
    )


async def _probe(plan: Plan, process: ProcessState) -> bool:
    if process.port is None:
        return True
    if process.role == "redis":
        return await probes.answers_ping(plan.redis_url())
    if process.role in ("postgres-primary", "postgres-standby"):
        server = plan.shard_server(process.shard_id) if process.shard_id else plan.catalog_server()
        return await probes.ask_postgres(server.app_dsn(plan.secrets)) is Answer.UP
    return await probes.serves(process.port)


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
