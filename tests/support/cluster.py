"""A whole embedded cluster of the test's own, started and stopped by the commands that people use."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import cycle, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from local import leftovers
from local.cluster import Plan
from local.layout import Layout
from local.record import load_record, load_secrets

PATIENT_WITH_REDIS = {"MEMSHARD_ROUTER_REDIS_TIMEOUT_S": "2"}
"""For clusters whose Redis is well, where what it knows is what is tested: a machine that stands still for the 50 ms
that routers give it otherwise makes them go on without it."""

_MEMSHARD = Path(sys.executable).parent / "memshard"
_UP_TIMEOUT_S = 90.0
_COMMAND_TIMEOUT_S = 100.0
# What is said of a port that somebody else has: by the supervisor, a service, and PostgreSQL or Redis.
_TAKEN = ("in use by something else; start again", "cannot listen on", "Address already in use")
# Below the embedded cluster's own ports, and those of outgoing connections.
_PORTS = range(12_000, 19_900)
# Test runs side by side begin at different places.
_candidates = islice(cycle(_PORTS), os.getpid() * 37 % len(_PORTS), None)


class LocalCluster:
    """`async with LocalCluster(...) as cluster:` a running cluster in a fresh directory on a free port.

    At its end `memshard down` runs; a process that survives that is a failure.
    """

    def __init__(
        self,
        *,
        shards: int = 2,
        replicas: int | None = 0,
        routers: int = 1,
        embedder: str = "local",
        dimensions: int | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment`: settings of its services, beside those that they are given by the cluster."""
        self.data_dir = Path(tempfile.mkdtemp(prefix="memshard-test-")).resolve()
        self.layout = Layout.of(self.data_dir)
        self.port = free_port(routers)
        self.address = f"127.0.0.1:{self.port}"
        self.options = ["--shards", str(shards), "--embedder", embedder]
        self.options += [] if replicas is None else ["--replicas", str(replicas)]
        self.options += ["--dimensions", str(dimensions)] if dimensions else []
        self.options += options
        self._environment = environment
        self._start = ["--port", str(self.port), "--routers", str(routers)]

    async def __aenter__(self) -> Self:
        try:
            await self.up()
        except BaseException:
            await self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logs = self.logs() if error is not None else ""
        survivors = await self._clean_up()
        if error is not None:
            sys.stderr.write(logs)  # pytest shows it with the failure.
        elif survivors:
            raise AssertionError(f"`memshard down` left behind: {survivors}")

    async def up(self, *options: str) -> str:
        """`memshard up --detach`; returns what it printed."""
        arguments = ("up", *self.options, *self._start, "--detach", *options)
        try:
            return await self.run(*arguments, timeout_s=_UP_TIMEOUT_S, environment=self._environment)
        except AssertionError as error:
            # Another cluster may take a port between its choice and its use, which a second start chooses anew.
            if not any(taken in str(error) for taken in _TAKEN):
                raise
            return await self.run(*arguments, timeout_s=_UP_TIMEOUT_S, environment=self._environment)

    async def down(self) -> str:
        """`memshard down`; returns what it printed."""
        return await self.run("down")

    async def status(self) -> dict[str, Any]:
        """`memshard status --json`, parsed, whatever its exit code."""
        _, output = await command("status", "--json", "--data-dir", str(self.data_dir))
        parsed: dict[str, Any] = json.loads(output)
        return parsed

    async def healthy(self) -> bool:
        """Whether every process is, by `memshard status`."""
        return all(process["healthy"] for process in (await self.status())["processes"])

    async def run(
        self, *arguments: str, timeout_s: float = _COMMAND_TIMEOUT_S, environment: Mapping[str, str] | None = None
    ) -> str:
        """A memshard command on this data directory, which must succeed; returns what it printed."""
        code, output = await command(
            *arguments, "--data-dir", str(self.data_dir), timeout_s=timeout_s, environment=environment
        )
        if code != 0:
            raise AssertionError(f"memshard {' '.join(arguments)} ended with {code}:\n{output}")
        return output

    def pid(self, name: str) -> int:
        """Pid of the process that `memshard status` calls `name`. LookupError: it doesn't run."""
        pid = self.pids().get(name)
        if pid is None:
            raise LookupError(f"{name} does not run")
        return pid

    def pids(self) -> dict[str, int]:
        """Those of all processes that run, by name, as the supervisor last wrote it."""
        processes = json.loads(self.layout.state.read_text())["processes"]
        return {process["name"]: int(process["pid"]) for process in processes if process["pid"] is not None}

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Sends a signal to a process; returns its pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def plan(self) -> Plan:
        """What the cluster consists of."""
        return Plan(self.layout, load_record(self.layout), load_secrets(self.layout), (self.port,))

    def catalog_dsn(self, *, owner: bool = False) -> str:
        """URL of the catalog, as the role of the services, or as its owner."""
        plan = self.plan()
        server = plan.catalog_server()
        return server.owner_dsn(plan.secrets) if owner else server.app_dsn(plan.secrets)

    def shard_dsn(self, shard_id: str, *, owner: bool = False) -> str:
        """URL of a shard's database on the server that is its primary now, as the service's role, or as its owner."""
        plan = self.plan()
        server = plan.shard_servers(shard_id)[self.primary(shard_id)]
        return server.owner_dsn(plan.secrets) if owner else server.app_dsn(plan.secrets)

    def primary(self, shard_id: str) -> str:
        """Name of the server that takes a shard's writes, as the supervisor last wrote it."""
        return self.servers(shard_id, "postgres-primary")[0]

    def standbys(self, shard_id: str) -> list[str]:
        """Names of the servers that follow it."""
        return self.servers(shard_id, "postgres-standby")

    def servers(self, shard_id: str, role: str) -> list[str]:
        """Names of a shard's processes with a role, as the supervisor last wrote it."""
        processes = json.loads(self.layout.state.read_text())["processes"]
        return [process["name"] for process in processes if (process["shard_id"], process["role"]) == (shard_id, role)]

    def redis_url(self) -> str:
        """URL of Redis."""
        return self.plan().redis_url()

    def logs(self) -> str:
        """The text of all logs."""
        files = sorted(self.layout.logs.glob("*.log*"))
        return "".join(f"--- {file.name}\n{file.read_text(errors='replace')}\n" for file in files)

    async def _clean_up(self) -> list[str]:
        """Stops everything and deletes the directory; returns what `memshard down` had left running."""
        try:
            if self.layout.root.exists():
                await self.down()
        finally:
            survivors = [" ".join(found.process.cmdline()) for found in leftovers.find(self.layout.root)]
            await leftovers.end_all(self.layout.root)
            shutil.rmtree(self.data_dir, ignore_errors=True)
        return survivors


async def command(
    *arguments: str, timeout_s: float = _COMMAND_TIMEOUT_S, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs memshard, with this beside what is in the environment; returns exit code and everything it printed."""
    process = await asyncio.create_subprocess_exec(
        str(_MEMSHARD),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.terminate()
        await process.communicate()
        raise
    return process.returncode or 0, output.decode()


@asynccontextmanager
async def at_work(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A memshard command that goes on meanwhile, with all that it prints in one pipe; interrupted if it still does at
    the end.
    """
    process = await asyncio.create_subprocess_exec(
        str(_MEMSHARD), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.communicate()


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that nobody listens on, out of reach of outgoing connections.

    Each call gives others, since what asks for one may take a while to listen on it.
    """
    for _ in range(_PORTS.stop - _PORTS.start):
        first = next(_candidates)
        if all(_free(port) for port in range(first, first + count)):
            for _ in range(count - 1):
                next(_candidates)
            return first
    raise LookupError("no free port")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
