"""What is done between the processes while a cluster starts: its databases when it is new, its catalog always."""

import asyncio
from collections.abc import Callable, Mapping

from common import catalog
from local import bootstrap
from local.cluster import Plan
from local.errors import LocalClusterError
from local.postgres import Server
from local.sessions import as_owner
from local.shard_servers import ShardServers
from local.state import TopologyState
from local.supervisor import Step

CATALOG_STEP = "catalog"

_TOPOLOGY_INTERVAL_S = 5.0
_TOPOLOGY_TIMEOUT_S = 2.0


def primary_step(shard_id: str) -> str:
    """The step that is done once a shard has a server that takes writes, and that has all roles and grants."""
    return f"{shard_id} primary"


class Steps:
    """What is done between the processes: the databases of a new cluster, the catalog of any, the shards' primaries."""

    def __init__(self, plan: Plan, shards: Mapping[str, ShardServers]) -> None:
        self.topology: TopologyState | None = None
        """The topology, once the catalog was read."""
        self.changed: Callable[[], None] = lambda: None
        """To be told when it is another one."""
        self._plan = plan
        self._shards = shards

    def all(self) -> list[Step]:
        """The steps of this start."""
        primaries = [self._have_primary(shard) for shard in self._shards.values()]
        catalog_server, *first_servers = self._plan.first_servers()
        if self._plan.record.complete:
            return [Step(CATALOG_STEP, self._tell_catalog, (catalog_server.name,)), *primaries]
        databases = [
            self._make_shard_database(shard_id, server)
            for shard_id, server in zip(self._shards, first_servers, strict=True)
        ]
        databases.append(Step("catalog database", self._make_catalog, (catalog_server.name,)))
        names = tuple(step.name for step in databases)
        return [*databases, Step(CATALOG_STEP, self._complete, names), *primaries]

    def of_new_shard(self, shard: ShardServers) -> list[Step]:
        """The steps by which a shard becomes part of a cluster that runs: its database, and what is in it."""
        server = shard.servers[shard.primary]
        database = self._make_shard_database(shard.shard_id, server)
        primary = self._have_primary(shard)
        return [database, Step(primary.name, primary.run, (*primary.needs, database.name))]

    async def follow_topology(self) -> None:
        """Keeps what is last known of the topology up to date. Never returns."""
        while True:
            await asyncio.sleep(_TOPOLOGY_INTERVAL_S)
            plan = self._plan
            try:
                async with as_owner(plan.catalog_server(), plan.secrets, _TOPOLOGY_TIMEOUT_S) as connection:
                    topology = TopologyState.of(await catalog.read_topology(connection))
            except LocalClusterError:  # It is away, or being made. What was known stays.
                continue
            if topology != self.topology:
                self.topology = topology
                self.changed()

    def _make_shard_database(self, shard_id: str, server: Server) -> Step:
        async def make() -> None:
            await bootstrap.make_database(server, self._plan.secrets, vector=True)

        return Step(f"{shard_id} database", make, (server.name,))

    def _have_primary(self, shard: ShardServers) -> Step:
        async def have() -> None:
            await shard.until_writable()
            await bootstrap.complete_shard_server(shard.servers[shard.primary], self._plan.secrets)

        return Step(primary_step(shard.shard_id), have, (CATALOG_STEP,))

    async def _make_catalog(self) -> None:
        plan = self._plan
        await bootstrap.make_database(plan.catalog_server(), plan.secrets, vector=False)
        await bootstrap.make_catalog(plan.catalog_server(), plan.secrets, plan.record, plan.shards())

    async def _complete(self) -> None:
        """The last step of making a cluster; from here on its directory is never thrown away."""
        await self._tell_catalog()
        # In the plan too: what is written next begins from that.
        self._plan.record = self._plan.record.model_copy(update={"complete": True})
        self._plan.record.save(self._plan.layout)

    async def _tell_catalog(self) -> None:
        plan = self._plan
        topology = await bootstrap.tell_catalog(plan.catalog_server(), plan.secrets, plan.record, plan.shards())
        self.topology = TopologyState.of(topology)
