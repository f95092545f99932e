"""Moving slots in a cluster of a test's own: the mover as a process, and what it leaves in the databases."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common import catalog, catalog_moves
from common.moves import Move
from common.topology import Topology
from local import mover
from shard.moving.tables import MOVED
from tests.support.cluster import LocalCluster
from tests.support.wire import database

_LINE_BYTES = 1024 * 1024

_LEFT = """
SELECT 'slot ' || slot_name AS what FROM pg_replication_slots WHERE slot_type = 'logical'
UNION ALL SELECT 'subscription ' || subname FROM pg_subscription
UNION ALL SELECT 'publication ' || pubname FROM pg_publication
UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
"""
_UNOWNED = """
SELECT count(*) FROM {table}
WHERE NOT EXISTS (SELECT FROM owned_slots WHERE owned_slots.slot = {table}.slot AND state = 'own')
"""
_FENCED = "SELECT count(*) FROM owned_slots WHERE state = 'fenced'"


@dataclass
class Slots:
    """The slots of a cluster, and movers for them."""

    cluster: LocalCluster
    settings: Mapping[str, Any]

    @asynccontextmanager
    async def mover(self, *arguments: str) -> AsyncIterator["MoverProcess"]:
        """A mover at work; killed at the end if it still is."""
        file = Path(self.cluster.data_dir) / "config" / "mover-test.yaml"
        file.write_text(yaml.safe_dump(mover.settings(self.cluster.plan(), **self.settings)))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "shard.mover", "--config", str(file), *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        try:
            yield MoverProcess(process)
        finally:
            if process.returncode is None:
                process.kill()
            _, errors = await process.communicate()
            sys.stderr.write(errors.decode(errors="replace"))

    async def move(self, *arguments: str) -> list[dict[str, Any]]:
        """Runs a mover to its end, which must be a good one; what it told."""
        async with self.mover(*arguments) as running:
            events = [event async for event in running.events()]
            assert events, await running.failure()
            assert events[-1]["event"] == "done", events[-3:]
        return events

    async def moves(self) -> list[Move]:
        async with database(self.cluster.catalog_dsn()) as connection:
            return await catalog_moves.read_moves(connection)

    async def topology(self) -> Topology:
        async with database(self.cluster.catalog_dsn()) as connection:
            return await catalog.read_topology(connection)

    async def left_over(self) -> list[str]:
        """What moves have left behind in any shard: streams, rows of slots that are not its own, fences."""
        found = []
        for shard_id in self.cluster.plan().record.shard_ids():
            async with database(self.cluster.shard_dsn(shard_id, owner=True)) as connection:
                found += [f"{shard_id}: {row['what']}" for row in await connection.fetch(_LEFT)]
                for table in MOVED:
                    if count := await connection.fetchval(_UNOWNED.format(table=table)):
                        found.append(f"{shard_id}: {count} rows of {table} in slots of others")
                if count := await connection.fetchval(_FENCED):
                    found.append(f"{shard_id}: {count} slots are fenced")
        return found

    async def rows(self) -> dict[str, dict[str, set[tuple[Any, ...]]]]:
        """Every row of every table that moves, as text, by shard."""
        found: dict[str, dict[str, set[tuple[Any, ...]]]] = {}
        for shard_id in self.cluster.plan().record.shard_ids():
            async with database(self.cluster.shard_dsn(shard_id, owner=True)) as connection:
                found[shard_id] = {
                    table: {tuple(row) for row in await connection.fetch(f"SELECT {table}::text FROM {table}")}
                    for table in MOVED
                }
        return found


@dataclass
class MoverProcess:
    """A mover at work."""

    process: asyncio.subprocess.Process

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What it tells, until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            yield json.loads(line)

    async def until(self, step: str) -> dict[str, Any]:
        """Returns when a move is at a step. AssertionError: it ended before."""
        async for event in self.events():
            if event.get("step") == step:
                return event
            assert event["event"] != "failed", event
        raise AssertionError(f"it ended before {step}")

    async def failure(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    def send(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
