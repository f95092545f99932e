"""Shards that come to a cluster that runs, and shards that leave it.

A shard is in the cluster's record once it has a database and the catalog knows it: whatever an attempt that was cut off
before has left is thrown away by the next. One that leaves is draining first, so that nobody plans slots for it any
more, and then out of the record, or the next start would wait for a shard that the catalog does not know: what is left
of it in the catalog by then, without slots and with none to come, harms nobody. To remove it again does the rest,
wherever an attempt was cut off.
"""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

from common import catalog, catalog_shards
from common.catalog import EpochConflictError
from common.sync_set import SyncSet
from common.topology import Replica, Shard, ShardStatus
from local import bootstrap, ports
from local.appointment import Appointer, RefusedError
from local.cluster import Plan, Programs, port_names
from local.errors import LocalClusterError
from local.record import MAX_SHARDS, Record
from local.sessions import as_owner
from local.shard_servers import ShardServers, Ties
from local.shard_watch import ShardWatch
from local.specs import Specs
from local.standby import Maker
from local.steps import Steps
from local.supervisor import Supervisor

_TRIES = 5
_CATALOG_TIMEOUT_S = 10.0


class Growth:
    """Adds shards and removes them, one at a time. `shards` are the servers of all of them, and change with it."""

    def __init__(
        self,
        plan: Plan,
        programs: Programs,
        shards: dict[str, ShardServers],
        supervisor: Supervisor,
        steps: Steps,
        log: logging.Logger,
    ) -> None:
        self._plan = plan
        self._programs = programs
        self._shards = shards
        self._supervisor = supervisor
        self._steps = steps
        self._log = log
        self._lock = asyncio.Lock()

    async def add(self, weight: int) -> AsyncIterator[tuple[str, str]]:
        """Starts a shard without slots: its name with each thing that is done. Raises LocalClusterError."""
        async with self._lock:
            plan = self._plan
            self._require_complete()
            if len(plan.record.shard_ids()) >= MAX_SHARDS:
                raise RefusedError(f"there are {MAX_SHARDS} shards, the most that there can be")
            record, shard_id = plan.record.with_new_shard()
            record = record.model_copy(update={"ports": self._ports(record)})
            # Its server knows nobody but the superuser at first, like those of a new cluster.
            new = replace(plan, record=record.model_copy(update={"complete": False}))
            servers = self._servers_of(new, shard_id)
            for server in servers.servers.values():
                await asyncio.to_thread(shutil.rmtree, server.pgdata, ignore_errors=True)
            first = servers.servers[servers.primary]
            await bootstrap.make_data_directories(
                [first], self._programs.postgres_bin, self._programs.account, plan.secrets
            )
            specs = Specs(new, self._programs, {shard_id: servers})
            await self._supervisor.add(
                shard_id, [specs.shard_server(servers, first.name)], self._steps.of_new_shard(servers)
            )
            yield shard_id, f"{first.name} has the database of {shard_id}"
            address = new.address(shard_id)
            replicas = tuple(Replica(name, new.address(name)) for name in record.replica_names(shard_id))
            await self._register(Shard(shard_id, address, weight, replicas=replicas), first.name)
            self._shards[shard_id] = servers
            plan.record = record
            record.save(plan.layout)
            yield shard_id, f"the catalog knows {shard_id}"
            specs = Specs(plan, self._programs, self._shards)
            others = [specs.shard_server(servers, name) for name in servers.servers if name != first.name]
            specs.write_metrics_targets()
            await self._supervisor.add(shard_id, [*others, *specs.services_of(shard_id)], [], [ShardWatch(servers).run])
            self._log.info("%s was added", shard_id)
            yield shard_id, f"{shard_id} serves, and has no slots yet; memshard rebalance gives it some"

    async def remove(self, shard_id: str) -> AsyncIterator[tuple[str, str]]:
        """Ends a shard without slots, and removes its data. Raises RefusedError, LocalClusterError."""
        async with self._lock:
            plan = self._plan
            self._require_complete()
            known = plan.record.shard_ids()
            if shard_id in known and len(known) == 1:
                raise RefusedError("it is the only shard")
            registered = await self._is_registered(shard_id)
            if not registered and shard_id not in known and shard_id not in self._shards:
                raise RefusedError(f"there is no shard {shard_id!r}, only {', '.join(known)}")
            names = [*plan.record.server_names(shard_id), shard_id, *plan.record.replica_names(shard_id)]
            if registered:
                await self._require_empty(shard_id)
                await self._let_drain(shard_id)
                # Again, now that nothing can come to it any more.
                await self._require_empty(shard_id)
            if shard_id in known:
                record = plan.record.without_shard(shard_id)
                record.save(plan.layout)
                plan.record = record
            if registered:
                await self._deregister(shard_id)
            yield shard_id, f"the catalog knows {shard_id} no more"
            await self._supervisor.remove(shard_id, names)
            servers = self._shards.pop(shard_id, None)
            Specs(plan, self._programs, self._shards).write_metrics_targets()
            yield shard_id, f"{shard_id} has ended"
            for server in servers.servers.values() if servers else ():
                await asyncio.to_thread(shutil.rmtree, server.pgdata, ignore_errors=True)
            self._log.info("%s was removed", shard_id)
            yield shard_id, f"the data of {shard_id} is removed"

    def _ports(self, record: Record) -> dict[str, int]:
        """The ports with those of what is new. What runs keeps its own, which would not seem to be free."""
        plan = self._plan
        kept = plan.record.ports
        new = [name for name in port_names(record, len(plan.router_ports)) if name not in kept]
        return {**kept, **ports.choose(new, {}, avoid=[*plan.router_ports, *kept.values()])}

    def _servers_of(self, plan: Plan, shard_id: str) -> ShardServers:
        maker = Maker(self._programs.postgres_bin, self._programs.account, plan.secrets, self._log)
        appointer = Appointer(shard_id, plan.catalog_server(), plan.shard_servers(shard_id), plan.secrets)
        servers = ShardServers(appointer, plan.record.replica_names(shard_id), maker, self._log, new=True)
        servers.ties = Ties(self._supervisor.process, self._supervisor.save_state)
        return servers

    async def _register(self, shard: Shard, primary: str) -> None:
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            topology = await catalog.read_topology(connection)
            if shard.shard_id in {known.shard_id for known in topology.shards}:
                # Of an attempt that was cut off: it has no slots.
                await self._retry(lambda epoch: catalog_shards.remove_shard(connection, epoch, shard.shard_id))
            await self._retry(lambda epoch: catalog_shards.add_shard(connection, epoch, shard))
            await catalog.create_sync_set(connection, shard.shard_id, SyncSet(primary, frozenset()))

    async def _is_registered(self, shard_id: str) -> bool:
        """Whether the catalog knows it."""
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            topology = await catalog.read_topology(connection)
        return shard_id in {shard.shard_id for shard in topology.shards}

    async def _let_drain(self, shard_id: str) -> None:
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            await self._retry(
                lambda epoch: catalog_shards.set_status(connection, epoch, shard_id, ShardStatus.DRAINING)
            )

    async def _deregister(self, shard_id: str) -> None:
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            await self._retry(lambda epoch: catalog_shards.remove_shard(connection, epoch, shard_id))

    def _require_complete(self) -> None:
        """A record that says less than what is on disk would have the next start make the cluster anew, empty."""
        if not self._plan.record.complete:
            raise RefusedError("the cluster is still being made")

    async def _require_empty(self, shard_id: str) -> None:
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            topology = await catalog.read_topology(connection)
            if slots := topology.slot_count(shard_id):
                raise RefusedError(
                    f"{shard_id} has {slots} slots; `memshard shards drain {shard_id}` moves them off it"
                )
            if await catalog_shards.is_moving(connection, shard_id):
                raise RefusedError(f"a move from or to {shard_id} is not over; `memshard moves list` shows it")

    async def _retry(self, change: Callable[[int], Awaitable[int]]) -> None:
        plan = self._plan
        for _ in range(_TRIES):
            async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
                epoch = await catalog.read_epoch(connection)
            try:
                await change(epoch)
            except EpochConflictError:
                continue
            return
        raise LocalClusterError("the catalog keeps changing")
