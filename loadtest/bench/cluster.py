"""The machine's side of the benchmark: a cluster of one shard, and beside it in the same PostgreSQL the plain tables.

The same server for both: then its settings, its memory and its disk are no difference between them.
"""

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from common import catalog
from loadtest.bench import echo, straight
from loadtest.bench.contender import Endpoint
from local.cluster import Plan, metrics_of
from local.layout import Layout
from local.postgres import SUPERUSER
from local.record import load_record, load_secrets

_DATABASE = "bench"
_SAME_TABLE = "copied_memories"
_MEMSHARD = Path(sys.executable).parent / "memshard"
_START_TIMEOUT_S = 60.0
INDEX_TIMEOUT_S = 3600.0
POLL_S = 0.25
_NOT_WANTED = "not wanted"
# What is generated from others cannot be copied, and is generated again.
_STORED_COLUMNS = """
SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
WHERE attrelid = 'memories'::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
"""


@dataclass(frozen=True, slots=True)
class Side:
    """A contender's name in the table, what a worker makes of it, and where it is. `why_not`: it is left out."""

    name: str
    kind: str
    endpoint: Endpoint
    sections: tuple[str, ...]
    loads: bool = True
    """Whether it has to be given its own rows; the sides of one cluster share them."""
    why_not: str = ""
    python: str = sys.executable
    """The interpreter of its callers."""


_ALL = ("search", "store", "get", "get-hot")


@asynccontextmanager
async def contenders(dimensions: int, others: str, without: Collection[str]) -> AsyncIterator[list[Side]]:
    """All of them, running, with empty tables. `others` is the interpreter that Chroma and mem0 are installed for, as
    far as they are; `without` has the kinds of contenders that are not wanted, and are left out.
    """
    async with AsyncExitStack() as stack:
        plan = await stack.enter_async_context(_embedded(1, dimensions))
        (port,) = plan.router_ports
        server, secrets = plan.shard_server("shard-0"), plan.secrets
        superuser = server.dsn(SUPERUSER, secrets.postgres, _DATABASE)
        await _make_database(server.dsn(SUPERUSER, secrets.postgres, "postgres"), superuser, dimensions)
        owner = server.owner_dsn(secrets)
        await make_same_table(owner)
        shard = await _shard(plan)
        sides = [
            Side("asyncpg, vector", "straight", _table(superuser, "plain_schema"), (*_ALL, "bulk")),
            Side("asyncpg, vector PLAIN", "straight", _table(superuser, "vector_plain"), (*_ALL, "bulk")),
            Side("asyncpg, halfvec PLAIN", "straight", _table(superuser, "halfvec_plain"), (*_ALL, "bulk")),
            Side(
                "COPY into the shard's table",
                "same_table",
                Endpoint(dsn=owner, table=_SAME_TABLE, column="halfvec"),
                ("bulk",),
                loads=False,
            ),
            Side("memshard, shard only", "shard_only", shard, _ALL, loads=False),
            Side("memshard", "routed", Endpoint(address=f"127.0.0.1:{port}"), (*_ALL, "bulk")),
            Side("memshard, by its client", "with_client", Endpoint(address=f"127.0.0.1:{port}"), _ALL, loads=False),
        ]
        if "echo" not in without:
            alone = await stack.enter_async_context(echo.serving())
            behind = await stack.enter_async_context(echo.serving(alone))
            sections = ("store", "get", "get-hot")
            sides += [
                Side("grpc.aio, an echo", "echo", Endpoint(address=alone), sections, loads=False),
                Side("grpc.aio, an echo behind another", "echo", Endpoint(address=behind), sections, loads=False),
            ]
        sides.append(await _chroma(stack, others, wanted="chroma" not in without))
        sides.append(await _mem0(others, server.port, secrets.postgres, wanted="mem0" not in without))
        yield [replace(side, why_not=_NOT_WANTED) if side.kind in without else side for side in sides]


@dataclass(frozen=True, slots=True)
class Alone:
    """A cluster of one shard, with nobody beside it."""

    address: str
    dsn: str
    """Of the shard's database, as its owner."""
    metrics_port: int
    """Of the shard's service."""

    async def index(self, question: str) -> asyncpg.Record:
        """What `question` says of an index, once that is there and measured: until then it has no rows."""
        connection = await asyncpg.connect(self.dsn)
        try:
            async with asyncio.timeout(INDEX_TIMEOUT_S):
                while (row := await connection.fetchrow(question)) is None:  # noqa: ASYNC110  # Nobody tells us.
                    await asyncio.sleep(POLL_S)
        finally:
            await connection.close()
        return row


@asynccontextmanager
async def alone(dimensions: int, environment: Mapping[str, str]) -> AsyncIterator[Alone]:
    """A cluster of one shard, whose services have the variables of `environment`."""
    async with _embedded(1, dimensions, environment) as plan:
        yield Alone(
            plan.addresses()[0],
            plan.shard_server("shard-0").owner_dsn(plan.secrets),
            plan.record.ports[metrics_of("shard-0")],
        )


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster, and where its services have their metrics, by what they are: "router", "shard"."""

    address: str
    metrics: dict[str, list[str]]


@asynccontextmanager
async def running(shards: int, dimensions: int) -> AsyncIterator[Running]:
    """An empty cluster of so many shards, for as long as it is wanted."""
    async with _embedded(shards, dimensions) as plan:
        metrics: dict[str, list[str]] = {}
        for target in json.loads(plan.layout.metrics_targets.read_text(encoding="utf-8")):
            role = target["labels"]["job"].removeprefix("memshard-")
            metrics.setdefault(role, []).extend(f"http://{place}/metrics" for place in target["targets"])
        yield Running(plan.addresses()[0], metrics)


@asynccontextmanager
async def _embedded(shards: int, dimensions: int, environment: Mapping[str, str] | None = None) -> AsyncIterator[Plan]:
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memshard-bench-")))
        port = _free_port()
        await _memshard(
            "up", "--detach", "--shards", str(shards), "--replicas", "0", "--embedder", "none", "--dimensions",
            str(dimensions), "--port", str(port), "--data-dir", str(root), environment=environment,
        )  # fmt: skip
        stack.push_async_callback(_memshard, "down", "--data-dir", str(root))
        layout = Layout.of(root)
        yield Plan(layout, load_record(layout), load_secrets(layout), (port,))


async def fill_same_table(sides: Sequence[Side]) -> None:
    """Copies what the shard holds into the table like its own: rows cost more where there are many already, and what is
    loaded into the one is compared with what is loaded into the other."""
    for side in sides:
        if side.kind != "same_table":
            continue
        connection = await asyncpg.connect(side.endpoint["dsn"])
        try:
            columns = await connection.fetchval(_STORED_COLUMNS)
            await connection.execute(f"INSERT INTO {_SAME_TABLE} ({columns}) SELECT {columns} FROM memories")  # noqa: S608
        finally:
            await connection.close()
    await vacuum(sides)


async def vacuum(sides: Sequence[Side]) -> None:
    """As after a night's autovacuum, for all alike."""
    dsns = {side.endpoint["dsn"] for side in sides if "dsn" in side.endpoint}
    for dsn in dsns:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute("VACUUM ANALYZE")
            await connection.execute("CHECKPOINT") if _DATABASE in dsn else None
        finally:
            await connection.close()


async def server_versions(sides: Sequence[Side]) -> str:
    """What the server says of itself: PostgreSQL's version, and that of the vector extension."""
    dsn = next(side.endpoint["dsn"] for side in sides if "dsn" in side.endpoint)
    connection = await asyncpg.connect(dsn)
    try:
        server: str = await connection.fetchval("SELECT version()")
        extension: str = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    finally:
        await connection.close()
    # "PostgreSQL 18.4 on x86_64-pc-linux-gnu, compiled by ..."
    return f"{server.partition(' on ')[0]}, vector {extension}"


def _table(dsn: str, table: str) -> Endpoint:
    return Endpoint(dsn=dsn, table=table, column=straight.TABLES[table][0])


async def _make_database(maintenance: str, dsn: str, dimensions: int) -> None:
    connection = await asyncpg.connect(maintenance)
    try:
        await connection.execute(f"DROP DATABASE IF EXISTS {_DATABASE} WITH (FORCE)")
        await connection.execute(f"CREATE DATABASE {_DATABASE}")
    finally:
        await connection.close()
    await straight.make_tables(dsn, dimensions)


async def make_same_table(dsn: str) -> None:
    """An empty table like the shard's own, with all of its indexes, beside it."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"DROP TABLE IF EXISTS {_SAME_TABLE}")
        await connection.execute(f"CREATE TABLE {_SAME_TABLE} (LIKE memories INCLUDING ALL)")
        options = await connection.fetchval("SELECT reloptions FROM pg_class WHERE oid = 'memories'::regclass")
        if options:
            await connection.execute(f"ALTER TABLE {_SAME_TABLE} SET ({', '.join(options)})")
    finally:
        await connection.close()


async def _shard(plan: Plan) -> Endpoint:
    connection = await asyncpg.connect(plan.catalog_server().app_dsn(plan.secrets))
    try:
        topology = await catalog.read_topology(connection)
    finally:
        await connection.close()
    shard = topology.shards[0]
    return Endpoint(
        address=shard.address, cluster_id=topology.cluster_id, shard_id=shard.shard_id, epoch=topology.epoch
    )


async def _chroma(stack: AsyncExitStack, python: str, *, wanted: bool) -> Side:
    sections = ("search", "store", "get", "bulk")
    if not wanted:
        return Side("Chroma server", "chroma", Endpoint(), sections, why_not=_NOT_WANTED)
    if not await _can_import(python, "chromadb"):
        return Side("Chroma server", "chroma", Endpoint(), sections, why_not="chromadb is not installed")
    port = _free_port()
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="memshard-bench-chroma-"))
    process = await asyncio.create_subprocess_exec(
        str(Path(python).parent / "chroma"), "run", "--path", directory, "--port", str(port), "--host", "127.0.0.1",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "ANONYMIZED_TELEMETRY": "False"},
    )  # fmt: skip

    async def end() -> None:
        if process.returncode is None:
            process.terminate()
        await process.wait()

    stack.push_async_callback(end)
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            writer.close()
            break
    return Side("Chroma server", "chroma", Endpoint(host="127.0.0.1", port=port), sections, python=python)


async def _mem0(python: str, port: int, password: str, *, wanted: bool) -> Side:
    sections = ("search", "store", "get", "bulk")
    name = "mem0 on pgvector"
    if not wanted:
        return Side(name, "mem0", Endpoint(), sections, why_not=_NOT_WANTED)
    if not await _can_import(python, "mem0.vector_stores.pgvector"):
        return Side(name, "mem0", Endpoint(), sections, why_not="mem0ai is not installed")
    endpoint = Endpoint(host="127.0.0.1", port=port, user=SUPERUSER, password=password, database=_DATABASE)
    return Side(name, "mem0", endpoint, sections, python=python)


async def _can_import(python: str, module: str) -> bool:
    process = await asyncio.create_subprocess_exec(
        python, "-c", f"import {module}", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait() == 0


async def _memshard(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    process = await asyncio.create_subprocess_exec(
        str(_MEMSHARD), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(f"memshard {arguments[0]} failed: {output.decode(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
