"""Standbys whose replay is paused, for a while or at random: what makes them lag on a machine where replay is fast."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from common.postgres import CONNECT_ERRORS
from local.postgres import SUPERUSER
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.wire import database


@asynccontextmanager
async def replay_paused(cluster: LocalCluster, shard_id: str) -> AsyncIterator[None]:
    """The shard's one standby gets the log, and replays none of it."""
    (name,) = cluster.standbys(shard_id)
    plan = cluster.plan()
    server = plan.shard_servers(shard_id)[name]
    async with database(server.dsn(SUPERUSER, plan.secrets.postgres)) as connection:
        await connection.execute("SELECT pg_wal_replay_pause()")

        async def paused() -> bool:
            return bool(await connection.fetchval("SELECT pg_get_wal_replay_pause_state() = 'paused'"))

        try:
            await eventually(paused)
            yield
        finally:
            await connection.execute("SELECT pg_wal_replay_resume()")


class UnsteadyReplay:
    """Pauses the replay of a shard's standbys in turns, one or several at a time, until stopped."""

    def __init__(self, cluster: LocalCluster, shard_id: str, seed: int, *, longest_pause_s: float = 1.0) -> None:
        self._cluster = cluster
        self._shard_id = shard_id
        self._random = random.Random(seed)
        self._longest_pause_s = longest_pause_s
        self.pauses = 0
        self.paused_s = 0.0

    async def run(self) -> None:
        """Pauses and resumes until cancelled, and leaves every standby going on."""
        try:
            while True:
                standbys = self._cluster.standbys(self._shard_id)
                chosen = self._random.sample(standbys, self._random.randint(1, len(standbys))) if standbys else []
                began = time.monotonic()
                for name in chosen:
                    self.pauses += await self._call(name, "pg_wal_replay_pause")
                await asyncio.sleep(self._random.uniform(0.05, self._longest_pause_s))
                for name in chosen:
                    await self._call(name, "pg_wal_replay_resume")
                self.paused_s += time.monotonic() - began
                await asyncio.sleep(self._random.uniform(0.05, 0.5))
        finally:
            for name in self._cluster.standbys(self._shard_id):
                await self._call(name, "pg_wal_replay_resume")

    async def _call(self, name: str, function: str) -> bool:
        """Whether the standby did it. One that is away, or has been promoted, does not."""
        plan = self._cluster.plan()
        dsn = plan.shard_servers(self._shard_id)[name].dsn(SUPERUSER, plan.secrets.postgres)
        with suppress(*CONNECT_ERRORS, asyncpg.ObjectNotInPrerequisiteStateError):
            connection = await asyncpg.connect(dsn, timeout=2)
            try:
                await connection.execute(f"SELECT {function}()")
            finally:
                await connection.close()
            return True
        return False
