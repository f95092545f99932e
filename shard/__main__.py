"""The shard service: `python -m shard [--config FILE]`."""

import argparse
import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from common import config, embedder, lifecycle, logs
from common.config import ShardSettings
from common.machine import Watch
from common.postgres import CONNECT_ERRORS, explain
from common.rpc import methods_of
from common.telemetry.exposition import Exposition
from common.trace_export import exporting
from memshard.internal.v1 import shard_pb2
from shard import heartbeat, identity, purge
from shard.commits import Commits
from shard.database import Database, close_pool, open_pool
from shard.disk import Disk
from shard.durability import Durability
from shard.embedding_queue import EmbeddingQueue
from shard.figures import FiguresWatch
from shard.large_users.keeper import Keeper
from shard.large_users.known import OwnIndexes
from shard.log_seen import LogSeen
from shard.metrics import ShardMetrics
from shard.primary import Newest, Primary
from shard.purge import Retention
from shard.read_service import admission
from shard.service import Host, ShardServicer
from shard.sync_keeper import SyncKeeper
from shard.writes import Writes

_log = logs.get_logger("shard")

_SERVICE = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
_HEALTH_INTERVAL_S = 0.25


async def main(settings: ShardSettings) -> None:
    """Settles who it is, serves until SIGTERM, and lets writes under way end before the pool closes."""
    newest = Newest()
    primary = Primary(settings.database_dsn.get_secret_value(), newest)
    owner_dsn = (settings.migration_dsn or settings.database_dsn).get_secret_value()
    owner = Primary(owner_dsn, newest)
    known = await identity.settle(settings, owner, primary)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(exporting("shard", settings))
        try:
            await primary.find(settings.primary_wait_s)
            pool = await open_pool(settings, f"memshard {settings.shard_id}", primary)
        except (*CONNECT_ERRORS, ValueError) as error:  # ValueError: the extension's types are missing.
            raise lifecycle.StartError(f"the shard's database cannot be used: {explain(error)}") from error
        stack.push_async_callback(close_pool, pool)
        database = Database(pool, primary, primary_wait_s=settings.primary_wait_s)
        commits = Commits()
        stack.push_async_callback(commits.settled, settings.drain_timeout_s)
        try:
            embeds = embedder.create(settings, known.embedding_model, known.dimensions)
        except embedder.EmbedderMismatchError as error:
            raise lifecycle.StartError(str(error)) from error
        queue = EmbeddingQueue(database, known, embeds, interval_s=settings.embedding_interval_s)
        durability = Durability(external=settings.sync_set == "external")
        # A successor waits for nobody yet. The keeper says when it does.
        primary.on_change(durability.set_local)
        keeper = SyncKeeper(settings, owner, durability)
        disk, machine = Disk(settings.data_path), Watch()
        own_indexes = OwnIndexes(database)
        # It looks for the primary itself: once a look, and not with the sync set's keeper.
        large_users = Keeper(settings, known, Primary(owner_dsn, newest), own_indexes)
        seen = LogSeen()
        writes = Writes(database, commits, durability, seen)
        servicer = ShardServicer(settings, known, database, writes, durability, queue, Host(disk, machine), large_users)
        server = lifecycle.Server(
            settings,
            [methods_of(_SERVICE, servicer, default_deadline_s=settings.default_deadline_s, admission=admission())],
        )
        retention = Retention(
            tombstone_s=settings.tombstone_ttl_s, version_s=max(settings.version_ttl_s, settings.tombstone_ttl_s)
        )
        figures = FiguresWatch(database)
        metrics = ShardMetrics(settings.shard_id, database, commits, durability, primary, disk, figures, own_indexes)
        await stack.enter_async_context(Exposition(settings, [metrics.look]))
        await server.start()
        await server.run_until_stopped(
            [
                primary.run,
                partial(_watch_health, server, primary),
                partial(heartbeat.run, primary.connect, seen, interval_s=settings.heartbeat_interval_s),
                partial(purge.run, database, retention, interval_s=settings.purge_interval_s),
                queue.run,
                disk.run,
                machine.run,
                figures.run,
                own_indexes.run,
                large_users.run,
                *([keeper.run] if settings.sync_set == "managed" else []),
            ]
        )
        if embeds is not None:
            await embeds.close()


async def _watch_health(server: lifecycle.Server, primary: Primary) -> None:
    primary.on_change(lambda: _log.info("primary changed", timeline=primary.timeline, available=primary.is_available))
    while True:
        await server.set_serving(primary.is_available)
        await asyncio.sleep(_HEALTH_INTERVAL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m shard", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file with settings; MEMSHARD_SHARD_… variables come first")
    arguments = parser.parse_args()
    lifecycle.run("shard", lambda: config.load(ShardSettings, arguments.config), main)
