"""The shard service: `python -m shard [--config FILE]`."""

import argparse
import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import asyncpg

from common import config, embedder, lifecycle
from common.config import ShardSettings
from common.postgres import CONNECT_ERRORS, explain
from common.rpc import generic_handler
from memshard.internal.v1 import shard_pb2
from shard import heartbeat, identity, purge
from shard.commits import Commits
from shard.database import Database, Probe, close_pool, open_pool
from shard.embedding_queue import EmbeddingQueue
from shard.purge import Retention
from shard.service import ShardServicer

_SERVICE = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
_HEALTH_INTERVAL_S = 1.0


async def main(settings: ShardSettings) -> None:
    """Settles who it is, serves until SIGTERM, and lets writes under way end before the pool closes."""
    known = await identity.settle(settings)
    async with AsyncExitStack() as stack:
        try:
            pool = await open_pool(settings, f"memshard {settings.shard_id}")
        except (*CONNECT_ERRORS, ValueError) as error:  # ValueError: the extension's types are missing.
            raise lifecycle.StartError(f"the shard's database cannot be used: {explain(error)}") from error
        stack.push_async_callback(close_pool, pool)
        database, commits = Database(pool), Commits()
        stack.push_async_callback(commits.settled, settings.drain_timeout_s)
        probe = Probe(settings.database_dsn.get_secret_value())
        stack.callback(probe.close)
        try:
            embeds = embedder.create(settings, known.embedding_model, known.dimensions)
        except embedder.EmbedderMismatchError as error:
            raise lifecycle.StartError(str(error)) from error
        queue = EmbeddingQueue(database, known, embeds, interval_s=settings.embedding_interval_s)
        servicer = ShardServicer(settings, known, database, commits, queue)
        server = lifecycle.Server(
            settings,
            [generic_handler(_SERVICE, servicer, default_deadline_s=settings.default_deadline_s)],
            [_SERVICE.full_name],
        )
        retention = Retention(
            tombstone_s=settings.tombstone_ttl_s, version_s=max(settings.version_ttl_s, settings.tombstone_ttl_s)
        )
        connect = partial(asyncpg.connect, settings.database_dsn.get_secret_value())
        await server.start()
        await server.run_until_stopped(
            [
                partial(_watch_health, server, probe),
                partial(heartbeat.run, connect, interval_s=settings.heartbeat_interval_s),
                partial(purge.run, database, retention, interval_s=settings.purge_interval_s),
                queue.run,
            ]
        )
        if embeds is not None:
            await embeds.close()


async def _watch_health(server: lifecycle.Server, probe: Probe) -> None:
    while True:
        await server.set_serving(await probe.is_writable())
        await asyncio.sleep(_HEALTH_INTERVAL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m shard", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file with settings; MEMSHARD_SHARD_… variables come first")
    arguments = parser.parse_args()
    lifecycle.run("shard", lambda: config.load(ShardSettings, arguments.config), main)
