"""`memshard database prepare` and `memshard catalog create`, on servers that hold nothing yet, and services on them."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
import yaml

from common import catalog
from common.catalog import EpochConflictError, UnknownShardError
from common.healthcheck import check
from common.level import Level
from common.roles import APP, CATALOG_DATABASE, MOVER, OWNER, REPLICATION, SHARD_DATABASE
from local import postgres
from local.account import make_traversable, postgres_account
from local.binaries import postgres_bin
from local.layout import Layout
from local.postgres import SUPERUSER, Server
from local.record import Secrets
from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import free_port
from tests.support.eventually import eventually
from tests.support.replicated import Node
from tests.support.wire import database, memory_service, store_request, topology_of

_MEMSHARD = Path(sys.executable).parent / "memshard"


@dataclass
class Outside:
    """Two servers as somebody else runs them, and a description of the cluster to be made of them."""

    root: Path
    catalog: Node
    shard: Node
    description: dict[str, Any] = field(default_factory=dict)

    def dsn(self, node: Node, role: str, password: str) -> str:
        of = {self.catalog.name: CATALOG_DATABASE, self.shard.name: SHARD_DATABASE}[node.name]
        return node.server.dsn(role, password, of)

    async def prepare(self, kind: str, **passwords: str) -> tuple[int, str]:
        node = self.catalog if kind == "catalog" else self.shard
        given = {f"MEMSHARD_{name.upper()}_PASSWORD": password for name, password in passwords.items()}
        return await memshard("database", "prepare", kind, MEMSHARD_ADMIN_DSN=node.dsn(), **given)

    async def create(self, owner: str, **changed: Any) -> tuple[int, str]:
        file = self.root / "cluster.yaml"
        file.write_text(yaml.safe_dump({**self.description, **changed}))
        dsn = self.dsn(self.catalog, OWNER, owner)
        return await memshard("catalog", "create", str(file), MEMSHARD_CATALOG_DSN=dsn)


async def memshard(*arguments: str, **variables: str) -> tuple[int, str]:
    """A memshard command that finds nothing in the environment but these variables; exit code and output."""
    process = await asyncio.create_subprocess_exec(
        str(_MEMSHARD),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**_kept(), **variables},
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


def _kept() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MEMSHARD_")}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def outside() -> AsyncIterator[Outside]:
    root = Path(tempfile.mkdtemp(prefix="memshard-test-")).resolve()
    account, secrets, layout = postgres_account(), Secrets.generate(), Layout.of(root)
    layout.make_directories()
    root.chmod(0o711)
    make_traversable(layout.postgres / "x", account)
    programs = postgres_bin(layout, account)
    nodes = [
        Node(Server(name, layout.pgdata(name), free_port(), "postgres"), programs, account, secrets, {})
        for name in ("catalog", "first")
    ]
    try:
        for node in nodes:
            await postgres.initialise(node.server, programs, account, secrets.postgres)
            await node.start()
        port = free_port()
        shards = {"shard-a": {"address": f"127.0.0.1:{port}", "primary_server": "first"}}
        yield Outside(root, nodes[0], nodes[1], {"embedder": "none", "dimensions": 3, "shards": shards})
    finally:
        for node in nodes:
            if node.process is not None:
                await node.kill()
        shutil.rmtree(root, ignore_errors=True)


async def test_a_cluster_is_made_of_empty_servers_and_serves(outside: Outside, user: str) -> None:
    passwords = {"owner": "owner-1", "app": "app-1", "replication": "replication-1", "mover": "mover-1"}
    for kind in ("catalog", "shard"):
        code, output = await outside.prepare(kind, **passwords)
        assert (code, output) == (0, f"The database of the {kind} is ready.\n")
    code, output = await outside.create("owner-1")
    assert code == 0, output
    assert "has been made; epoch 1" in output
    await _serves(outside, user, APP, "app-1")
    async with database(outside.dsn(outside.shard, APP, "app-1")) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("CREATE TABLE mine (x int)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE owned_slots SET state = 'own'")
    async with database(outside.dsn(outside.catalog, APP, "app-1")) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE topology SET epoch = 9")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("INSERT INTO levels VALUES ('', 'readonly')")
        # By compare-and-set alone, as it is asked to.
        epoch = await catalog.read_epoch(connection)
        assert await catalog.set_level(connection, epoch, "shard-a", Level.READONLY) == epoch + 1
        with pytest.raises(EpochConflictError):
            await catalog.set_level(connection, epoch, "", Level.READONLY)
        with pytest.raises(UnknownShardError):
            await catalog.set_level(connection, epoch + 1, "shard-b", Level.READONLY)
        assert (await catalog.read_topology(connection)).levels == {"shard-a": Level.READONLY}
        assert await catalog.set_level(connection, epoch + 1, "shard-a", None) == epoch + 2


async def test_services_may_serve_as_another_member_of_the_role(outside: Outside, user: str) -> None:
    """How passwords are changed with no pause: one role after the other."""
    await _prepared(outside)
    for node in (outside.catalog, outside.shard):
        async with database(node.dsn()) as connection:
            await connection.execute("CREATE ROLE memshard_app_b LOGIN PASSWORD 'b-1' IN ROLE memshard_app")
    await _serves(outside, user, "memshard_app_b", "b-1")


async def test_the_owner_of_a_shard_may_set_whom_commits_wait_for(outside: Outside) -> None:
    await _prepared(outside)
    async with database(outside.dsn(outside.shard, OWNER, "owner-1")) as connection:
        await connection.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        assert await connection.fetchval("SELECT pg_reload_conf()")
        await connection.fetch("SELECT * FROM pg_stat_replication")


async def test_everything_may_be_done_again_and_passwords_become_the_new_ones(outside: Outside) -> None:
    await _prepared(outside)
    before = await topology_of(outside.dsn(outside.catalog, APP, "app-1"))
    for kind in ("catalog", "shard"):
        assert (await outside.prepare(kind, owner="owner-1", app="app-2"))[0] == 0
    code, output = await outside.create("owner-1")
    assert code == 0, output
    assert f"was there; epoch {before.epoch}." in output
    for node in (outside.catalog, outside.shard):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(outside.dsn(node, APP, "app-1"))
        async with database(outside.dsn(node, APP, "app-2")) as connection:
            assert await connection.fetchval("SELECT current_user") == APP
    await _prepared(outside)


async def test_addresses_are_brought_up_to_date(outside: Outside) -> None:
    await _prepared(outside)
    dsn = outside.dsn(outside.catalog, APP, "app-1")
    before = await topology_of(dsn)
    shards = {"shard-a": {"address": "elsewhere:50061", "replicas": {"replica-a": "[::1]:50071"}}}
    code, output = await outside.create("owner-1", shards=shards)
    assert code == 0, output
    assert "shard-a: its address or its replicas have changed." in output
    after = await topology_of(dsn)
    assert after.epoch > before.epoch
    assert after.ranges == before.ranges
    (shard,) = after.shards
    assert (shard.address, [r.address for r in shard.replicas]) == ("elsewhere:50061", ["[::1]:50071"])
    assert (await outside.create("owner-1"))[0] == 0


async def test_a_shard_that_the_cluster_lacks_is_told_and_given_nothing(outside: Outside) -> None:
    await _prepared(outside)
    shards = {**outside.description["shards"], "shard-b": {"address": "b:50061"}}
    code, output = await outside.create("owner-1", shards=shards)
    assert code == 0
    assert "shard-b is not of this cluster yet" in output
    assert len((await topology_of(outside.dsn(outside.catalog, APP, "app-1"))).shards) == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dimensions": 4}, "dimensions 3, not 4"),
        ({"text_language": "german"}, "text_language english, not german"),
        ({"shards": {}}, "shards: "),
        ({"shards": {"Shard_A": {"address": "a:1"}}}, "shards.Shard_A"),
        ({"shards": {"shard-a": {"address": "no-port"}}}, "shards.shard-a.address"),
        ({"embedder": "http"}, "embedder_model go together"),
        ({"colour": "blue"}, "colour: "),
    ],
)
async def test_what_cannot_be_is_refused_and_named(outside: Outside, changed: dict[str, Any], told: str) -> None:
    await _prepared(outside)
    code, output = await outside.create("owner-1", **changed)
    assert code == 1
    assert told in output
    assert "Traceback" not in output


async def test_messages_hold_no_password(outside: Outside) -> None:
    code, output = await memshard(
        *("database", "prepare", "shard"),
        MEMSHARD_ADMIN_DSN=outside.shard.server.dsn(SUPERUSER, "wrong-secret"),
        MEMSHARD_OWNER_PASSWORD="o-secret",
        MEMSHARD_APP_PASSWORD="a-secret",
    )
    assert code == 1
    assert "password authentication failed" in output
    assert "secret" not in output
    code, output = await memshard("database", "prepare", "shard", MEMSHARD_ADMIN_DSN=outside.shard.dsn())
    assert code == 1
    assert "--owner-password-file, or MEMSHARD_OWNER_PASSWORD" in output


async def test_who_streams_and_who_moves_slots_may_replicate_and_nobody_else(outside: Outside) -> None:
    await _prepared(outside)
    rows = "SELECT rolname FROM pg_roles WHERE rolreplication AND rolname LIKE 'memshard%' ORDER BY 1"
    async with database(outside.shard.dsn()) as connection:
        assert [row["rolname"] for row in await connection.fetch(rows)] == [MOVER, REPLICATION]
        member = "SELECT pg_has_role($1, $2, 'USAGE')"
        for role in (OWNER, "pg_create_subscription", "pg_monitor"):
            assert await connection.fetchval(member, MOVER, role)
        assert not await connection.fetchval(member, APP, OWNER)
    async with database(outside.dsn(outside.shard, MOVER, "mover-1")) as connection:
        await connection.execute("SELECT pg_log_standby_snapshot()")
    async with database(outside.dsn(outside.catalog, MOVER, "mover-1")) as connection:
        await connection.execute("UPDATE topology SET epoch = epoch")
        await connection.execute("DELETE FROM moves")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("UPDATE cluster SET dimensions = 4")


async def _serves(outside: Outside, user: str, role: str, password: str) -> None:
    """Services on the cluster, as this role: a memory is stored and found, and nothing is refused to them."""
    catalog_dsn = outside.dsn(outside.catalog, role, password)
    async with AsyncExitStack() as stack:
        shard = await stack.enter_async_context(
            _running(
                "shard",
                outside.root,
                port=int(outside.description["shards"]["shard-a"]["address"].partition(":")[2]),
                shard_id="shard-a",
                catalog_dsn=catalog_dsn,
                database_dsn=outside.dsn(outside.shard, role, password),
                migration_dsn=outside.dsn(outside.shard, OWNER, "owner-1"),
                embedder="none",
            )
        )
        router = await stack.enter_async_context(
            _running("router", outside.root, port=free_port(), catalog_dsn=catalog_dsn, embedder="none")
        )
        api = await stack.enter_async_context(memory_service(router))
        stored = await api.StoreMemory(store_request(user, "tea", embedding=[1.0, 0.0, 0.0]), timeout=10)
        found = await api.SearchMemories(
            pb.SearchMemoriesRequest(user_id=user, embedding=[1.0, 0.1, 0.0], limit=5), timeout=10
        )
        assert [result.memory.id for result in found.results] == [stored.memory.id]
        assert await asyncio.to_thread(check, shard, "memshard.internal.v1.ShardService") == "SERVING"
    assert "InsufficientPrivilege" not in (outside.root / "shard.log").read_text()


async def _prepared(outside: Outside) -> None:
    for kind in ("catalog", "shard"):
        code, output = await outside.prepare(
            kind, owner="owner-1", app="app-1", replication="replication-1", mover="mover-1"
        )
        assert code == 0, output
    code, output = await outside.create("owner-1")
    assert code == 0, output


@asynccontextmanager
async def _running(service: str, root: Path, **settings: object) -> AsyncIterator[str]:
    """A service as a container would run it: with settings from the environment. Its address, once it serves."""
    given: Mapping[str, str] = {f"MEMSHARD_{service}_{name}".upper(): str(value) for name, value in settings.items()}
    address = f"127.0.0.1:{settings['port']}"
    with (root / f"{service}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", service), stdout=log, stderr=log, env={**_kept(), **given}
        )
    try:

        async def serves() -> bool:
            assert process.returncode is None, (root / f"{service}.log").read_text()
            return await asyncio.to_thread(check, address) == "SERVING"

        await eventually(serves, within_s=20)
        yield address
    finally:
        process.terminate()
        await process.wait()
