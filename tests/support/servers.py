"""The PostgreSQL servers of one shard as a test sees and arms them: who takes writes, who follows, what is recorded."""

import json
from dataclasses import dataclass

import asyncpg

from common import catalog
from common.sync_set import SyncSet
from local import replication
from local.cluster import Plan
from local.errors import LocalClusterError
from local.layout import Layout
from local.postgres import SUPERUSER, Server
from local.sessions import as_owner

SHARD = "shard-0"
# What a query may wait for a primary that waits for its standbys.
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Servers:
    """The servers of the first shard of a cluster that has no services, so that nobody keeps its sync set."""

    plan: Plan

    def __getitem__(self, name: str) -> Server:
        return self.plan.shard_servers(SHARD)[name]

    def names(self) -> list[str]:
        return list(self.plan.shard_servers(SHARD))

    def pid(self, name: str) -> int:
        return pid(self.plan.layout, name)

    async def writable(self) -> list[str]:
        """The servers that take writes at this moment."""
        found = []
        for name in self.names():
            try:
                view = await replication.look_at_primary(self[name], self.plan.secrets)
            except LocalClusterError:
                continue
            found += [] if view.in_recovery else [name]
        return found

    async def primary(self) -> str:
        """The one server that takes writes, with all others streaming from it. AssertionError: not yet."""
        (name,) = await self.writable()
        view = await replication.look_at_primary(self[name], self.plan.secrets)
        assert set(self.names()) - {name} <= view.lag_bytes.keys(), view
        return name

    async def sync_set(self) -> SyncSet:
        async with as_owner(self.plan.catalog_server(), self.plan.secrets) as connection:
            found = await catalog.read_sync_set(connection, SHARD)
        assert found is not None
        return found

    async def arm(self) -> str:
        """Lets commits wait for a quorum of all standbys, as a shard's service would; the primary."""
        primary = await self.primary()
        members = frozenset(self.names()) - {primary}
        planned = await self.sync_set()
        if planned.members != members:
            async with as_owner(self.plan.catalog_server(), self.plan.secrets) as connection:
                await catalog.change_sync_set(connection, SHARD, planned, members=members, following=None)
        await replication.wait_for(self[primary], self.plan.secrets, members)
        return primary

    async def execute(self, name: str, statement: str, *values: object, waits: bool = True) -> list[asyncpg.Record]:
        """As the superuser in the shard's database of one server. `waits`: its commit does, for the standbys."""
        secrets = self.plan.secrets
        settings = {} if waits else {"synchronous_commit": "local"}
        connection = await asyncpg.connect(
            self[name].dsn(SUPERUSER, secrets.postgres), timeout=_TIMEOUT_S, server_settings=settings
        )
        try:
            return await connection.fetch(statement, *values)
        finally:
            connection.terminate()


def pid(layout: Layout, name: str) -> int:
    """Pid of a process, from the state file. LookupError: it does not run."""
    for process in json.loads(layout.state.read_text())["processes"]:
        if process["name"] == name and process["pid"] is not None:
            return int(process["pid"])
    raise LookupError(f"{name} does not run")
