"""The embedded cluster as data: its parts by name, their ports and addresses, its PostgreSQL servers."""

from dataclasses import dataclass
from pathlib import Path

from common.roles import CATALOG_DATABASE, SHARD_DATABASE
from common.topology import Replica, Shard
from local import binaries, redis
from local.account import Account
from local.layout import Layout
from local.ports import HOST
from local.postgres import Server
from local.record import Record, Secrets

CATALOG_SERVER = "postgres-catalog"
REDIS = "redis"
# The supervisor's own service, for `memshard failover` and its kin.
ADMIN = "admin"


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


@dataclass(slots=True)
class Plan:
    """What a cluster consists of. Its parts are named as `memshard status` names them. The record is another one once a
    shard has come or left.
    """

    layout: Layout
    record: Record
    secrets: Secrets
    router_ports: tuple[int, ...]

    def addresses(self) -> tuple[str, ...]:
        """Where the routers are reached."""
        return tuple(f"{HOST}:{port}" for port in self.router_ports)

    def shards(self) -> list[Shard]:
        """The shards, with where they and their replicas are reached."""
        return [
            Shard(
                shard_id,
                self.address(shard_id),
                self.record.weight_of(shard_id),
                replicas=tuple(Replica(name, self.address(name)) for name in self.record.replica_names(shard_id)),
            )
            for shard_id in self.record.shard_ids()
        ]

    def address(self, name: str) -> str:
        """Where a process listens whose port is kept."""
        return f"{HOST}:{self.record.ports[name]}"

    def catalog_server(self) -> Server:
        """The server that holds the catalog."""
        return self._server(CATALOG_SERVER, CATALOG_DATABASE)

    def shard_servers(self, shard_id: str) -> dict[str, Server]:
        """The servers that hold a shard's memories, by name. Which of them is the primary changes."""
        return {name: self._server(name, SHARD_DATABASE) for name in self.record.server_names(shard_id)}

    def shard_server(self, shard_id: str) -> Server:
        """The first of them: the primary of a new shard, and of one without standbys."""
        return next(iter(self.shard_servers(shard_id).values()))

    def first_servers(self) -> list[Server]:
        """The servers that a new cluster begins with; the others are made from them."""
        return [self.catalog_server(), *map(self.shard_server, self.record.shard_ids())]

    def redis_url(self) -> str:
        """Where Redis is reached, with its password."""
        return redis.url(self.record.ports[REDIS], self.secrets.redis)

    def _server(self, name: str, database: str) -> Server:
        return Server(name, self.layout.pgdata(name), self.record.ports[name], database)


def router_name(number: int) -> str:
    """A router's name. Routers are counted from 0."""
    return f"router-{number}"


def admin_of(router: str) -> str:
    """The name under which the port is kept on which a router serves operators."""
    return f"{router}-admin"


def metrics_of(service: str) -> str:
    """The name under which the port is kept on which a service has its metrics."""
    return f"{service}-metrics"


def service_names(record: Record, routers: int) -> dict[str, list[str]]:
    """The services, by what they are."""
    shard_ids = record.shard_ids()
    return {
        "router": [router_name(number) for number in range(routers)],
        "shard": shard_ids,
        "replica": [name for shard_id in shard_ids for name in record.replica_names(shard_id)],
    }


def port_names(record: Record, routers: int) -> list[str]:
    """Whose ports are kept, with so many routers."""
    shard_ids = record.shard_ids()
    servers = [name for shard_id in shard_ids for name in record.server_names(shard_id)]
    services = service_names(record, routers)
    admins = [admin_of(name) for name in services["router"]]
    metrics = [metrics_of(name) for names in services.values() for name in names]
    return [CATALOG_SERVER, *servers, REDIS, *shard_ids, *services["replica"], ADMIN, *admins, *metrics]
