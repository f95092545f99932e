"""One shard's PostgreSQL servers, a primary `a` and standbys that stream from it, and a catalog on a server of its own.

The servers are the wheel's, started straight from their data directories: nothing restarts, promotes or rewinds them
but the test. Each standby's link to its primary goes through a proxy that can be cut.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from common import catalog
from common.roles import APP, CATALOG_DATABASE, OWNER, SHARD_DATABASE
from common.sync_set import SyncSet
from common.topology import Shard, Topology
from local import bootstrap, postgres
from local.account import Account, make_traversable, postgres_account, run_as
from local.binaries import postgres_bin
from local.layout import Layout
from local.postgres import SUPERUSER, Server
from local.record import Secrets
from memshard.internal.v1 import shard_pb2
from tests.support.cluster import free_port
from tests.support.eventually import eventually
from tests.support.proxy import Proxy
from tests.support.wire import database, shard_service

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub

SHARD = "shard-0"
DIMENSIONS = 3

# What an embedded cluster's servers have too: a standby that lost its primary tries again soon.
_SETTINGS = {"shared_buffers": "16MB", "hot_standby_feedback": "on", "wal_retrieve_retry_interval": "100ms"}
_GRANTS = f"""
GRANT pg_monitor TO {OWNER}, {APP};
GRANT ALTER SYSTEM ON PARAMETER synchronous_standby_names TO {OWNER};
GRANT EXECUTE ON FUNCTION pg_reload_conf() TO {OWNER};
"""
_CATALOG_GRANTS = f"""
GRANT SELECT ON ALL TABLES IN SCHEMA public TO {APP};
GRANT UPDATE (members, following, version) ON sync_sets TO {APP};
"""


@dataclass
class Node:
    """A server that the test starts, stops, kills and promotes. Its name is its `cluster_name`."""

    server: Server
    binaries: Path
    account: Account | None
    secrets: Secrets
    settings: dict[str, str]
    link: Proxy | None = None
    process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def dsn(self, role: str = SUPERUSER) -> str:
        """URL of its database as a role."""
        passwords = {
            SUPERUSER: self.secrets.postgres,
            OWNER: self.secrets.memshard_owner,
            APP: self.secrets.memshard_app,
        }
        return self.server.dsn(role, passwords[role])

    async def start(self) -> None:
        """Starts it, and waits until it answers."""
        settings = {**_SETTINGS, **self.settings, "cluster_name": self.name}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self.server.pgdata.with_suffix(".log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.server.command(self.binaries),
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.server.pgdata,
                env=postgres.environment(),
                start_new_session=True,
                **run_as(self.account),
            )
        await eventually(lambda: self.fetchval("SELECT true"), within_s=20)

    async def kill(self) -> None:
        """SIGKILL to the server and to all of its backends; returns when they are gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """A fast shutdown."""
        await self._end(signal.SIGINT)

    async def _end(self, number: int) -> None:
        if self.process is None:
            return
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            backends = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(number)
            for backend in backends if number == signal.SIGKILL else ():
                with suppress(psutil.NoSuchProcess):
                    backend.kill()
            await eventually(lambda: not any(_lives(backend) for backend in backends), within_s=20)
        await self.process.wait()
        self.process = None

    def freeze(self) -> None:
        """SIGSTOP to the server and all of its backends."""
        for process in self._processes():
            process.suspend()

    def thaw(self) -> None:
        """SIGCONT to them."""
        for process in self._processes():
            process.resume()

    def _processes(self) -> list[psutil.Process]:
        assert self.process is not None
        try:
            server = psutil.Process(self.process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []  # It has ended meanwhile.

    async def execute(self, statement: str) -> None:
        """A statement of the superuser."""
        async with database(self.dsn()) as connection:
            await connection.execute(statement)

    async def fetchval(self, query: str, *arguments: object) -> Any:
        """The first value of a query by the superuser."""
        async with database(self.dsn()) as connection:
            return await connection.fetchval(query, *arguments)

    async def pause_replay(self) -> None:
        """From now on what is received is not replayed. Only of a standby."""
        await self.execute("SELECT pg_wal_replay_pause()")

        async def paused() -> bool:
            return bool(await self.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"))

        # It pauses once it has replayed something more, or woken up.
        await eventually(paused, within_s=10)

    async def resume_replay(self) -> None:
        await self.execute("SELECT pg_wal_replay_resume()")

    async def promote(self) -> None:
        """Makes a primary of a standby."""
        assert await self.fetchval("SELECT pg_promote(wait_seconds => 20)")

    async def set_sync_names(self, names: str) -> None:
        """The standbys that its commits wait for, by hand."""
        await self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        await self.execute("SELECT pg_reload_conf()")

        async def in_force() -> bool:
            return bool(await self.fetchval("SELECT current_setting('synchronous_standby_names') = $1", names))

        await eventually(in_force)


@dataclass
class Replicated:
    """The servers and the catalog, and services started on them."""

    root: Path
    nodes: dict[str, Node]
    catalog: Node
    catalog_link: Proxy
    _stack: AsyncExitStack
    topology: Topology = field(init=False)
    addresses: dict[str, str] = field(default_factory=dict)
    _services: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    @property
    def primary(self) -> Node:
        return self.nodes["a"]

    @property
    def standby(self) -> Node:
        return self.nodes["b"]

    def shard_dsn(self, role: str, names: Sequence[str]) -> str:
        """URL of the shard's database on whichever of the servers takes writes."""
        head, _, tail = self.primary.dsn(role).partition("@")
        hosts = ",".join(self.nodes[name].address for name in names)
        return f"{head}@{hosts}/{tail.partition('/')[2]}?target_session_attrs=read-write"

    @property
    def catalog_dsn(self) -> str:
        """URL of the catalog, through a proxy, as the services have it."""
        return self.catalog.dsn(APP).replace(self.catalog.address, self.catalog_link.address)

    async def sync_set(self) -> SyncSet:
        """What the catalog has, by another way than the services take."""
        async with database(self.catalog.dsn()) as connection:
            found = await catalog.read_sync_set(connection, SHARD)
        assert found is not None
        return found

    async def start_shard(self, name: str = "shard", **settings: object) -> "ShardServiceAsyncStub":
        """The shard's service as a process; returns its internal API."""
        every = list(self.nodes)
        return await self._start(
            "shard",
            name,
            {
                "database_dsn": self.shard_dsn(APP, every),
                "migration_dsn": self.shard_dsn(OWNER, every),
                "embedder": "none",
                **settings,
            },
        )

    async def start_replica(self, node: str = "b", **settings: object) -> "ShardServiceAsyncStub":
        """A replica's service on a standby; returns its internal API."""
        return await self._start("replica", f"replica-{node}", {"database_dsn": self.nodes[node].dsn(APP), **settings})

    async def _start(self, service: str, name: str, settings: dict[str, object]) -> "ShardServiceAsyncStub":
        port = free_port()
        file = self.root / f"{name}.yaml"
        common = {"port": port, "catalog_dsn": self.catalog_dsn, "shard_id": SHARD, "drain_timeout_s": 1.0}
        file.write_text(yaml.safe_dump({**common, **settings}))
        with (self.root / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", service, "--config", str(file), stdout=log, stderr=log
            )
        self._services[name] = process
        self.addresses[name] = f"127.0.0.1:{port}"
        stub = await self._stack.enter_async_context(shard_service(self.addresses[name]))
        await eventually(lambda: stub.Describe(shard_pb2.DescribeRequest(), timeout=1), within_s=20)
        return stub

    def send(self, name: str, number: int) -> None:
        """A signal to a service."""
        self._services[name].send_signal(number)

    async def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Ends a service."""
        process = self._services.pop(name)
        process.send_signal(number)
        await process.wait()

    def logs(self) -> str:
        """What services and servers have written."""
        files = sorted([*self.root.glob("*.log"), *self.root.glob("postgres/*.log")])
        return "".join(f"--- {file.name}\n{file.read_text(errors='replace')[-20_000:]}\n" for file in files)

    async def close(self) -> None:
        for process in self._services.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        for node in (*self.nodes.values(), self.catalog):
            if node.process is not None:
                node.thaw()
                await node.kill()


@asynccontextmanager
async def replicated(*standbys: str, settings: Mapping[str, str] = MappingProxyType({})) -> AsyncIterator[Replicated]:
    """A primary `a` and the standbys named, streaming; no service runs yet. Everything is killed at the end."""
    root = Path(tempfile.mkdtemp(prefix="memshard-test-")).resolve()
    account, secrets = postgres_account(), Secrets.generate()
    layout = Layout.of(root)
    layout.make_directories()
    root.chmod(0o711)
    make_traversable(layout.postgres / "x", account)
    binaries = postgres_bin(layout, account)

    def node(name: str, of_database: str) -> Node:
        server = Server(name, layout.pgdata(name), free_port(), of_database)
        return Node(server, binaries, account, secrets, dict(settings))

    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        primary, home = node("a", SHARD_DATABASE), node("catalog", CATALOG_DATABASE)
        link = await stack.enter_async_context(Proxy("127.0.0.1", home.server.port))
        made = Replicated(root, {"a": primary}, home, link, stack)
        stack.push_async_callback(made.close)
        await asyncio.gather(_initialise(primary), _initialise(home))
        made.topology = await _make_catalog(home)
        await primary.execute(_GRANTS)
        for name in standbys:
            standby = node(name, SHARD_DATABASE)
            standby.link = await stack.enter_async_context(Proxy("127.0.0.1", primary.server.port))
            made.nodes[name] = standby
            await copy(primary, standby)
            await standby.start()
        try:
            yield made
        finally:
            sys.stderr.write(made.logs())  # pytest shows it with a failure.


async def copy(primary: Node, standby: Node) -> None:
    """Makes a standby's data directory from a backup of its primary, with a replication slot of its own."""
    assert standby.link is not None
    host, _, port = standby.link.address.rpartition(":")
    pgdata = standby.server.pgdata
    pgdata.mkdir(mode=0o700)
    if standby.account is not None:
        os.chown(pgdata, standby.account.uid, standby.account.gid)
    conninfo = (
        f"host={host} port={port} user={SUPERUSER} password={primary.secrets.postgres} application_name={standby.name}"
    )
    process = await asyncio.create_subprocess_exec(
        *(str(standby.binaries / "pg_basebackup"), "-D", str(pgdata), "-d", conninfo),
        *("-R", "-C", "-S", standby.name, "-X", "stream", "-c", "fast"),
        stderr=subprocess.PIPE,
        cwd=pgdata,
        env=postgres.environment(),
        **run_as(standby.account),
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


def _lives(process: psutil.Process) -> bool:
    try:
        # A dead one stays as a zombie until whoever inherited it has noticed.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _initialise(node: Node) -> None:
    await postgres.initialise(node.server, node.binaries, node.account, node.secrets.postgres)
    # The database that `start` waits for is made only after it.
    there = node.server.database
    node.server = Server(node.name, node.server.pgdata, node.server.port, "postgres")
    await node.start()
    node.server = Server(node.name, node.server.pgdata, node.server.port, there)
    await bootstrap.make_database(node.server, node.secrets, vector=there == SHARD_DATABASE)


async def _make_catalog(home: Node) -> Topology:
    async with database(home.dsn(OWNER)) as connection:
        await catalog.create(connection, [Shard(SHARD, "127.0.0.1:1")], embedding_model="", dimensions=DIMENSIONS)
        await connection.execute(_CATALOG_GRANTS)
        return await catalog.read_topology(connection)
