"""What is done between the processes while a cluster starts: its databases when it is new, its catalog always."""

from local import bootstrap
from local.cluster import CATALOG_STEP, Plan
from local.state import TopologyState
from local.supervisor import Step


class Steps:
    """What is done between the processes: the databases of a new cluster, the catalog of any."""

    def __init__(self, plan: Plan) -> None:
        self.topology: TopologyState | None = None
        """The topology, once the catalog was read."""
        self._plan = plan

    def all(self) -> list[Step]:
        """The steps of this start."""
        catalog_server = self._plan.catalog_server().name
        if self._plan.record.complete:
            return [Step(CATALOG_STEP, self._tell_addresses, (catalog_server,))]
        databases = [self._make_shard_database(shard_id) for shard_id in self._plan.record.shard_ids()]
        catalog = Step("catalog database", self._make_catalog, (catalog_server,))
        names = tuple(step.name for step in (*databases, catalog))
        return [*databases, catalog, Step(CATALOG_STEP, self._complete, names)]

    def _make_shard_database(self, shard_id: str) -> Step:
        server = self._plan.shard_server(shard_id)

        async def make() -> None:
            await bootstrap.make_database(server, self._plan.secrets, vector=True)

        return Step(f"{shard_id} database", make, (server.name,))

    async def _make_catalog(self) -> None:
        plan = self._plan
        await bootstrap.make_database(plan.catalog_server(), plan.secrets, vector=False)
        await bootstrap.make_catalog(plan.catalog_server(), plan.secrets, plan.record, plan.shard_addresses())

    async def _complete(self) -> None:
        """The last step of making a cluster; from here on its directory is never thrown away."""
        await self._tell_addresses()
        self._plan.record.model_copy(update={"complete": True}).save(self._plan.layout)

    async def _tell_addresses(self) -> None:
        plan = self._plan
        topology = await bootstrap.tell_addresses(plan.catalog_server(), plan.secrets, plan.shard_addresses())
        self.topology = TopologyState.of(topology)
