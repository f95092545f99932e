"""The embedded cluster as data: its servers, its processes with what each needs, the steps between them."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local import binaries, leftovers, postgres, probes, redis, services
from local.account import Account
from local.layout import Layout
from local.ports import HOST
from local.postgres import CATALOG_DATABASE, SHARD_DATABASE, Server
from local.process import ProcessSpec
from local.record import Record, Secrets
from local.services import Service

# PostgreSQL ends its backends at once when the orderly way takes too long; nothing that was acknowledged is lost.
_IMMEDIATE = signal.SIGQUIT

CATALOG_SERVER = "postgres-catalog"
REDIS = "redis"
CATALOG_STEP = "catalog"


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs from wheels, and who runs PostgreSQL."""

    postgres_bin: Path
    redis_server: Path
    account: Account | None

    @classmethod
    def find(cls, layout: Layout, account: Account | None) -> "Programs":
        """Raises MissingPartError."""
        return cls(binaries.postgres_bin(layout, account), binaries.redis_server(), account)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cluster consists of. Its parts are named as `memshard status` names them."""

    layout: Layout
    record: Record
    secrets: Secrets
    router_ports: tuple[int, ...]

    def addresses(self) -> tuple[str, ...]:
        """Where the routers are reached."""
        return tuple(f"{HOST}:{port}" for port in self.router_ports)

    def shard_addresses(self) -> dict[str, str]:
        """Where the shards are reached, by id."""
        return {shard_id: f"{HOST}:{self.record.ports[shard_id]}" for shard_id in self.record.shard_ids()}

    def catalog_server(self) -> Server:
        """The server that holds the catalog."""
        return self._server(CATALOG_SERVER, CATALOG_DATABASE)

    def shard_server(self, shard_id: str) -> Server:
        """The server that holds a shard's memories."""
        return self._server(server_name(shard_id), SHARD_DATABASE)

    def servers(self) -> list[Server]:
        """All PostgreSQL servers."""
        return [self.catalog_server(), *(self.shard_server(shard_id) for shard_id in self.record.shard_ids())]

    def redis_url(self) -> str:
        """Where Redis is reached, with its password."""
        return redis.url(self.record.ports[REDIS], self.secrets.redis)

    def databases(self, programs: Programs) -> list[ProcessSpec]:
        """PostgreSQL and Redis."""
        shard_ids = [None, *self.record.shard_ids()]
        specs = [
            self._postgres(server, shard_id, programs)
            for server, shard_id in zip(self.servers(), shard_ids, strict=True)
        ]
        return [*specs, self._redis(programs)]

    def services(self) -> list[ProcessSpec]:
        """Shards and routers."""
        shards = [self._shard(shard_id) for shard_id in self.record.shard_ids()]
        routers = [self._router(number, port) for number, port in enumerate(self.router_ports)]
        return [*shards, *routers]

    def _server(self, name: str, database: str) -> Server:
        return Server(name, self.layout.pgdata(name), self.record.ports[name], database)

    def _postgres(self, server: Server, shard_id: str | None, programs: Programs) -> ProcessSpec:
        # A server that is being made knows nobody but the superuser yet.
        dsn = (
            server.app_dsn(self.secrets)
            if self.record.complete
            else server.dsn(postgres.SUPERUSER, self.secrets.postgres, "postgres")
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

        return ProcessSpec(
            name=server.name,
            role="postgres-primary",
            shard_id=shard_id,
            command=server.command(programs.postgres_bin),
            port=server.port,
            cwd=server.pgdata,
            log=self.layout.log(server.name),
            environment=postgres.environment(),
            account=programs.account,
            probe=is_up,
            recovers=recovers,
            fence=fence,
            stop_signal=signal.SIGINT,
            urgent_signal=_IMMEDIATE,
            stop_timeout_s=leftovers.POSTGRES_STOP_TIMEOUT_S,
            stop_order=3,
        )

    def _redis(self, programs: Programs) -> ProcessSpec:
        port, url = self.record.ports[REDIS], self.redis_url()
        file = redis.write_settings(self.layout, port, self.secrets.redis)

        async def is_up() -> bool:
            return await probes.answers_ping(url)

        return ProcessSpec(
            name=REDIS,
            role="redis",
            command=(str(programs.redis_server), str(file)),
            port=port,
            cwd=self.layout.redis,
            log=self.layout.log(REDIS),
            environment=postgres.environment(),
            probe=is_up,
            stop_timeout_s=leftovers.REDIS_STOP_TIMEOUT_S,
            stop_order=2,
        )

    def _shard(self, shard_id: str) -> ProcessSpec:
        server = self.shard_server(shard_id)
        settings = services.shard_settings(
            self.record,
            shard_id,
            self.record.ports[shard_id],
            database=server.app_dsn(self.secrets),
            migration=server.owner_dsn(self.secrets),
            catalog=self.catalog_server().app_dsn(self.secrets),
        )
        needs = (CATALOG_STEP, server.name)
        return self._service(shard_id, "shard", settings, needs, stop_order=1, shard_id=shard_id)

    def _router(self, number: int, port: int) -> ProcessSpec:
        settings = services.router_settings(
            self.record, port, catalog=self.catalog_server().app_dsn(self.secrets), redis=self.redis_url()
        )
        needs = (CATALOG_STEP, REDIS, *self.record.shard_ids())
        return self._service(f"router-{number}", "router", settings, needs, stop_order=0)

    def _service(
        self,
        name: str,
        service: Service,
        settings: dict[str, Any],
        needs: tuple[str, ...],
        *,
        stop_order: int,
        shard_id: str | None = None,
    ) -> ProcessSpec:
        port: int = settings["port"]
        file = services.write_settings(self.layout, name, settings)

        async def is_up() -> bool:
            return await probes.serves(port)

        return ProcessSpec(
            name=name,
            role=service,
            shard_id=shard_id,
            # -P: the working directory is no place to import from.
            command=(sys.executable, "-P", "-m", service, "--config", str(file)),
            port=port,
            cwd=self.layout.run,
            log=self.layout.log(name),
            environment=services.environment(service, settings, self.layout.root),
            probe=is_up,
            stop_timeout_s=leftovers.SERVICE_STOP_TIMEOUT_S,
            needs=needs,
            stop_order=stop_order,
        )


def server_name(shard_id: str) -> str:
    """Name of a shard's PostgreSQL server."""
    return f"postgres-{shard_id}"


def port_names(record: Record) -> list[str]:
    """The processes whose ports are kept."""
    shard_ids = record.shard_ids()
    return [CATALOG_SERVER, *map(server_name, shard_ids), REDIS, *shard_ids]
