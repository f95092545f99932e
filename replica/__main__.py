"""The replica service: `python -m replica [--config FILE]`."""

import argparse
import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import asyncpg

from common import config, lifecycle, logs
from common.config import ReplicaSettings
from common.postgres import CONNECT_ERRORS, CONNECT_TIMEOUT_S, explain
from common.rpc import methods_of
from common.telemetry.exposition import Exposition
from common.trace_export import exporting
from memshard.internal.v1 import shard_pb2
from replica import lag
from replica.lag import Probe
from replica.metrics import ReplicaMetrics
from replica.service import ReplicaServicer
from shard import identity
from shard.database import Database, close_pool, open_pool
from shard.identity import Identity
from shard.large_users.known import OwnIndexes
from shard.read_service import admission

_log = logs.get_logger("replica")

_SERVICE = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
_HEALTH_INTERVAL_S = 0.25
_IDENTITY_INTERVAL_S = 0.25
# Between repetitions in the log of what is being waited for.
_REMINDER_S = 10.0


async def main(settings: ReplicaSettings) -> None:
    """Waits until the standby knows whose it is, and serves until SIGTERM."""
    known = await _identity(settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(exporting("replica", settings))
        dsn = settings.database_dsn.get_secret_value()
        try:
            pool = await open_pool(settings, f"memshard replica of {settings.shard_id}")
        except (*CONNECT_ERRORS, ValueError) as error:  # ValueError: the extension's types are missing.
            raise lifecycle.StartError(f"the replica's database cannot be used: {explain(error)}") from error
        stack.push_async_callback(close_pool, pool)
        probe = Probe(dsn, settings.max_lag_s)
        stack.callback(probe.close)
        database = Database(pool)
        own_indexes = OwnIndexes(database)
        servicer = ReplicaServicer(settings, known, database, own_indexes)
        server = lifecycle.Server(
            settings,
            [methods_of(_SERVICE, servicer, default_deadline_s=settings.default_deadline_s, admission=admission())],
        )
        metrics = ReplicaMetrics(settings.shard_id, database, probe, own_indexes)
        await stack.enter_async_context(Exposition(settings, [metrics.look]))
        await server.start()
        await server.run_until_stopped([partial(_watch_health, server, probe, database), own_indexes.run])


async def _identity(settings: ReplicaSettings) -> Identity:
    """Who this is, from what the primary has written: a new standby may have to wait for that.

    Raises StartError when it is another shard's standby.
    """
    told_at, loop = 0.0, asyncio.get_running_loop()
    while True:
        try:
            connection = await asyncpg.connect(settings.database_dsn.get_secret_value(), timeout=CONNECT_TIMEOUT_S)
            try:
                known = await identity.read(connection)
                # All that a read needs has been replayed once this can be read.
                await lag.replayed(connection)
            finally:
                await connection.close()
            why = "the shard has not joined its cluster yet"
        except CONNECT_ERRORS as error:
            known, why = None, explain(error)
        if known is not None and known.shard_id == settings.shard_id:
            return known
        if known is not None:
            raise lifecycle.StartError(
                f"this database belongs to {known.shard_id}, not to {settings.shard_id}: check shard_id and "
                "database_dsn"
            )
        if not told_at or loop.time() - told_at >= _REMINDER_S:
            _log.info("waiting for the standby's data", why=why)
            told_at = loop.time()
        await asyncio.sleep(_IDENTITY_INTERVAL_S)


async def _watch_health(server: lifecycle.Server, probe: Probe, database: Database) -> None:
    while True:
        await server.set_serving(await probe.is_serving())
        if probe.promoted:
            await database.recycle()
        await asyncio.sleep(_HEALTH_INTERVAL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m replica", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file with settings; MEMSHARD_REPLICA_… variables come first")
    arguments = parser.parse_args()
    lifecycle.run("replica", lambda: config.load(ReplicaSettings, arguments.config), main)
