"""The processes of an embedded cluster, each with what it needs, how it is asked for its health and how it ends."""

import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.roles import APP, OWNER
from local import leftovers, postgres, probes, redis, services
from local.cluster import REDIS, Plan, Programs, admin_of, metrics_of, router_name, service_names
from local.postgres import Server, dsn_of_primary
from local.process import ProcessSpec
from local.services import Service
from local.shard_servers import ShardServers
from local.steps import CATALOG_STEP, primary_step

# PostgreSQL ends its backends at once when the orderly way takes too long; nothing that was acknowledged is lost.
_IMMEDIATE = signal.SIGQUIT


@dataclass(frozen=True, slots=True)
class Specs:
    """Makes the processes of a plan. `shards` are the servers of each shard, by its id."""

    plan: Plan
    programs: Programs
    shards: Mapping[str, ShardServers]

    def databases(self) -> list[ProcessSpec]:
        """PostgreSQL and Redis."""
        servers = [self.shard_server(shard, name) for shard in self.shards.values() for name in shard.servers]
        return [self.catalog(), *servers, self._redis()]

    def catalog(self) -> ProcessSpec:
        """The server of the catalog."""
        return self._postgres(self.plan.catalog_server())

    def services(self) -> list[ProcessSpec]:
        """Shards, replicas and routers."""
        record = self.plan.record
        of_shards = [spec for shard_id in record.shard_ids() for spec in self.services_of(shard_id)]
        self.write_metrics_targets()
        routers = [self._router(number, port) for number, port in enumerate(self.plan.router_ports)]
        return [*of_shards, *routers]

    def services_of(self, shard_id: str) -> list[ProcessSpec]:
        """A shard and its replicas."""
        names = self.plan.record.replica_names(shard_id)
        return [self._shard(shard_id), *(self._replica(self.shards[shard_id], name) for name in names)]

    def write_metrics_targets(self) -> None:
        """Tells Prometheus which services there are, and where their metrics."""
        record = self.plan.record
        named = service_names(record, len(self.plan.router_ports))
        services.write_metrics_targets(
            self.plan.layout,
            {role: {name: record.ports[metrics_of(name)] for name in names} for role, names in named.items()},
            {name: shard_id for shard_id in record.shard_ids() for name in (shard_id, *record.replica_names(shard_id))},
        )

    def _postgres(self, server: Server, **more: Any) -> ProcessSpec:
        plan = self.plan
        # A server that is being made knows nobody but the superuser yet.
        dsn = (
            server.app_dsn(plan.secrets)
            if plan.record.complete
            else server.dsn(postgres.SUPERUSER, plan.secrets.postgres, "postgres")
        )

        async def is_up() -> bool:
            return await probes.ask_postgres(dsn) is probes.Answer.UP

        async def recovers() -> bool:
            return await probes.ask_postgres(dsn) is probes.Answer.RECOVERING

        async def fence() -> None:
            await leftovers.fence(server.pgdata)
            # Nobody runs on this directory now. The pid in here may by now be another server's of ours, as happens
            # when a container starts again, and would then keep this one from starting.
            (server.pgdata / "postmaster.pid").unlink(missing_ok=True)

        given: dict[str, Any] = {"role": "postgres-primary", "probe": is_up, "recovers": recovers, **more}
        return ProcessSpec(
            name=server.name,
            command=server.command(self.programs.postgres_bin),
            port=server.port,
            cwd=server.pgdata,
            log=plan.layout.log(server.name),
            environment=postgres.environment(),
            account=self.programs.account,
            fence=fence,
            stop_signal=signal.SIGINT,
            urgent_signal=_IMMEDIATE,
            stop_timeout_s=leftovers.POSTGRES_STOP_TIMEOUT_S,
            stop_order=3,
            **given,
        )

    def shard_server(self, shard: ShardServers, name: str) -> ProcessSpec:
        """One PostgreSQL server of a shard."""
        plain = self._postgres(shard.servers[name])

        async def is_up() -> bool:
            if not await plain.probe():
                return False
            shard.healthy(name)
            return True

        async def recovers() -> bool:
            return name in shard.making | shard.lost or (plain.recovers is not None and await plain.recovers())

        async def prepare() -> None:
            await shard.prepare(name)

        async def died() -> None:
            await shard.died(name)

        first = next(iter(shard.servers))
        return self._postgres(
            shard.servers[name],
            shard_id=shard.shard_id,
            probe=is_up,
            recovers=recovers,
            prepare=prepare,
            died=died,
            current_role=lambda: shard.role(name),
            required=lambda: shard.primary == name,
            # The catalog knows who is the primary; of a new cluster it is the first, and the catalog is yet to come.
            needs=() if name == first and not self.plan.record.complete else (CATALOG_STEP,),
        )

    def _redis(self) -> ProcessSpec:
        plan = self.plan
        port, url = plan.record.ports[REDIS], plan.redis_url()
        file = redis.write_settings(plan.layout, port, plan.secrets.redis)

        async def is_up() -> bool:
            return await probes.answers_ping(url)

        async def hangs() -> bool:
            return await probes.redis_hangs(url)

        return ProcessSpec(
            name=REDIS,
            role="redis",
            command=(str(self.programs.redis_server), str(file)),
            port=port,
            cwd=plan.layout.redis,
            log=plan.layout.log(REDIS),
            environment=postgres.environment(),
            probe=is_up,
            hangs=hangs,
            stop_timeout_s=leftovers.REDIS_STOP_TIMEOUT_S,
            stop_order=2,
        )

    def _shard(self, shard_id: str) -> ProcessSpec:
        plan = self.plan
        servers = list(plan.shard_servers(shard_id).values())
        settings = services.shard_settings(
            plan.record,
            shard_id,
            plan.record.ports[shard_id],
            metrics_port=plan.record.ports[metrics_of(shard_id)],
            data=plan.layout.postgres,
            database=dsn_of_primary(servers, APP, plan.secrets.memshard_app),
            migration=dsn_of_primary(servers, OWNER, plan.secrets.memshard_owner),
            catalog=plan.catalog_server().app_dsn(plan.secrets),
        )
        services.write_settings(plan.layout, shard_id, settings)
        needs = (CATALOG_STEP, primary_step(shard_id))
        return self._service(shard_id, "shard", settings, needs=needs, stop_order=1, shard_id=shard_id)

    def _replica(self, shard: ShardServers, name: str) -> ProcessSpec:
        plan = self.plan

        def settings(server: Server) -> dict[str, Any]:
            return services.replica_settings(
                shard.shard_id,
                plan.record.ports[name],
                metrics_port=plan.record.ports[metrics_of(name)],
                database=server.app_dsn(plan.secrets),
                catalog=plan.catalog_server().app_dsn(plan.secrets),
            )

        async def prepare() -> None:
            # After a failover its standby is another server.
            services.write_settings(plan.layout, name, settings(await shard.place_replica(name)))

        first = settings(shard.server_of_replica(name))
        # The service's own checks want the schema, which the shard makes.
        needs = (CATALOG_STEP, shard.shard_id)
        return self._service(
            name,
            "replica",
            first,
            needs=needs,
            stop_order=1,
            shard_id=shard.shard_id,
            prepare=prepare,
            required=lambda: False,
        )

    def _router(self, number: int, port: int) -> ProcessSpec:
        plan = self.plan
        name = router_name(number)
        admin_port = plan.record.ports[admin_of(name)]
        settings = services.router_settings(
            plan.record,
            port,
            metrics_port=plan.record.ports[metrics_of(name)],
            admin_port=admin_port,
            admin_token=plan.layout.admin_token,
            catalog=plan.catalog_server().app_dsn(plan.secrets),
            redis=plan.redis_url(),
        )
        services.write_settings(plan.layout, name, settings)
        needs = (CATALOG_STEP, REDIS, *plan.record.shard_ids())

        async def is_up() -> bool:
            # It begins with the public port. That one says NOT_SERVING in maintenance, in which a cluster may start.
            return await probes.serves(admin_port)

        return self._service(name, "router", settings, needs=needs, stop_order=0, probe=is_up)

    def _service(self, name: str, service: Service, settings: dict[str, Any], **more: Any) -> ProcessSpec:
        plan, port = self.plan, settings["port"]

        async def is_up() -> bool:
            return await probes.serves(port)

        async def hangs() -> bool:
            return await probes.hangs(port)

        given: dict[str, Any] = {"probe": is_up, **more}
        return ProcessSpec(
            name=name,
            role=service,
            # -P: the working directory is no place to import from.
            command=(sys.executable, "-P", "-m", service, "--config", str(plan.layout.settings(name))),
            port=port,
            cwd=plan.layout.run,
            log=plan.layout.log(name),
            environment=services.environment(service, settings, plan.layout.root),
            hangs=hangs,
            handover_variable=services.handover_variable(service),
            stop_timeout_s=leftovers.SERVICE_STOP_TIMEOUT_S,
            **given,
        )
