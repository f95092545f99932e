"""A cluster with a proxy before each of its parts: shards, replicas, Redis, the catalog, and the router itself; and
before the shards' databases, where that is asked for.

The catalog names the proxies where it named shards and replicas, so that every router goes through them. The one that
tests call is a process of their own, with settings that lead it to Redis and the catalog through proxies too.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import catalog
from common.topology import Replica, Topology
from local.cluster import CATALOG_SERVER, REDIS
from local.layout import write_atomically
from local.services import environment
from tests.support.cluster import LocalCluster, free_port
from tests.support.eventually import eventually
from tests.support.proxies import Proxies
from tests.support.wire import database, topology_of, user_slot

ROUTER = "router-of-the-test"
_START_S = 60.0
_STOP_S = 15.0


@dataclass(frozen=True)
class FaultyCluster:
    """A running cluster, its proxies, and the router that is reached through nothing but them."""

    cluster: LocalCluster
    proxies: Proxies
    topology: Topology
    """Where its parts really are."""
    address: str
    """The router itself."""
    proxied_address: str
    """The router behind a proxy, whose name is ROUTER."""
    router: psutil.Process

    def replicas(self, shard_id: str) -> list[str]:
        """Names of a shard's replicas."""
        (shard,) = (shard for shard in self.topology.shards if shard.shard_id == shard_id)
        return [replica.replica_id for replica in shard.replicas]

    def users(self, shard_id: str, count: int, prefix: str = "user") -> list[str]:
        """Names of users whose memories are on a shard."""
        found: list[str] = []
        number = 0
        while len(found) < count:
            name = f"{prefix}-{number}"
            number += 1
            if self.topology.owner(user_slot(name)).shard_id == shard_id:
                found.append(name)
        return found

    async def shard_requests(self) -> int:
        """How many requests have reached shards and replicas, looks at their health aside."""
        counts = await self.proxies.requests()
        shards = {shard.shard_id for shard in self.topology.shards}
        replicas = {replica.replica_id for shard in self.topology.shards for replica in shard.replicas}
        return sum(count for name, count in counts.items() if name in shards | replicas)


@asynccontextmanager
async def faulty_cluster(
    *,
    shards: int = 2,
    replicas: int = 0,
    routers: int = 1,
    embedder: str = "none",
    dimensions: int = 16,
    options: Sequence[str] = (),
    router_module: str = "router",
    databases: bool = False,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[FaultyCluster]:
    """Such a cluster, with nothing wrong, and `routers` of its own that no fault reaches. `settings` are the test's
    router's, beside those that the cluster gives its own; `environment` has settings of the cluster's services.
    """
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(
            LocalCluster(
                shards=shards,
                replicas=replicas,
                routers=routers,
                embedder=embedder,
                dimensions=dimensions,
                options=options,
                environment=environment,
            )
        )
        await eventually(cluster.healthy, within_s=_START_S)
        topology = await topology_of(cluster.catalog_dsn())
        ports, port = cluster.plan().record.ports, free_port()
        targets = {shard.shard_id: shard.address for shard in topology.shards}
        targets |= {replica.replica_id: replica.address for shard in topology.shards for replica in shard.replicas}
        targets |= {name: f"127.0.0.1:{ports[name]}" for name in (REDIS, CATALOG_SERVER)}
        targets[ROUTER] = f"127.0.0.1:{port}"
        if databases:
            servers = [name for shard in topology.shards for name in cluster.plan().shard_servers(shard.shard_id)]
            targets |= {name: f"127.0.0.1:{ports[name]}" for name in servers}
        proxies = await stack.enter_async_context(Proxies(targets))
        await _name_in_catalog(cluster, topology, proxies.addresses)
        if databases:
            await asyncio.gather(
                *(_lead_to_databases(cluster, shard.shard_id, targets, proxies) for shard in topology.shards)
            )
        given = yaml.safe_load(cluster.layout.settings("router-0").read_text())
        for setting, name in (("redis_url", REDIS), ("catalog_dsn", CATALOG_SERVER)):
            assert targets[name] in given[setting]
            given[setting] = given[setting].replace(targets[name], proxies.addresses[name])
        given |= {"port": port, "admin_port": None, "metrics_port": None, **(settings or {})}
        router = await stack.enter_async_context(_router(cluster, given, router_module))
        yield FaultyCluster(cluster, proxies, topology, targets[ROUTER], proxies.addresses[ROUTER], router)


async def _name_in_catalog(cluster: LocalCluster, topology: Topology, addresses: Mapping[str, str]) -> None:
    async with database(cluster.catalog_dsn(owner=True)) as connection:
        shards = {shard.shard_id: addresses[shard.shard_id] for shard in topology.shards}
        epoch = await catalog.set_addresses(connection, await catalog.read_epoch(connection), shards)
        replicas = {
            shard.shard_id: [Replica(one.replica_id, addresses[one.replica_id]) for one in shard.replicas]
            for shard in topology.shards
        }
        await catalog.set_replicas(connection, epoch, replicas)


async def _lead_to_databases(
    cluster: LocalCluster, shard_id: str, targets: Mapping[str, str], proxies: Proxies
) -> None:
    """Has a shard's service reach its PostgreSQL servers through proxies, which it does once it is started again."""
    file = cluster.layout.settings(shard_id)
    settings = file.read_text()
    for name in cluster.plan().shard_servers(shard_id):
        assert targets[name] in settings
        settings = settings.replace(targets[name], proxies.addresses[name])
    write_atomically(file, settings, durable=False)
    before = cluster.kill(shard_id)
    await eventually(lambda: cluster.pid(shard_id) != before, within_s=_START_S)
    await eventually(cluster.healthy, within_s=_START_S)


@asynccontextmanager
async def _router(cluster: LocalCluster, settings: Mapping[str, Any], module: str) -> AsyncIterator[psutil.Process]:
    """A router process of the test's own, serving."""
    layout = cluster.layout
    file = layout.settings(ROUTER)
    write_atomically(file, yaml.safe_dump(dict(settings)), durable=False)
    with layout.log(ROUTER).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            "--config",
            str(file),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment("router", settings, layout.root),
        )
    try:
        await eventually(lambda: serves(f"127.0.0.1:{settings['port']}"), within_s=_START_S)
        yield psutil.Process(process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
        await process.wait()


async def serves(address: str, timeout_s: float = 1.0) -> bool:
    """Whether a service's health check says so. Raises what gRPC raises."""
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # Its published stubs lack the methods.
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
