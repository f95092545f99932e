"""The router service: `python -m router [--config FILE]`."""

import argparse
import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from common import catalog, config, embedder, lifecycle, postgres
from common.catalog import Cluster
from common.config import RouterSettings
from common.level import Effects
from common.rpc import methods_of
from common.telemetry.exposition import Exposition
from common.topology import Topology
from common.trace_export import exporting
from memshard.v1 import memory_pb2
from router import admin, self_healing
from router.admin import AdminServicer
from router.alerts import Alerts
from router.checks import Checks
from router.dispatch import Dispatch
from router.embed import Embedding
from router.embeddings import EmbeddingCache
from router.entrance import Entrance
from router.envelope import Envelopes
from router.fanout import Fanout
from router.findings import Report
from router.invalidation import Invalidations
from router.location import LocationCache
from router.memories import MemoryCache
from router.memories_redis import MemoryRedis
from router.metrics import RouterMetrics
from router.monitor import Monitor
from router.observed import Observed
from router.parts import Parts
from router.place import Placement
from router.probes import Probes
from router.reads import Reads
from router.recovery import Recovery
from router.redis_cache import RedisCache
from router.remembered import Remembered
from router.replicas import Replicas
from router.request_ids import RequestIds
from router.retries import Retries
from router.scatter import Scatter
from router.search_cache import SearchCache
from router.service import MemoryServicer
from router.shards import Shards
from router.single_flight import SingleFlight
from router.stamps import Timelines
from router.telling import Telling
from router.tokens import Tokens
from router.topology_watch import TopologyWatch

_SERVICE = memory_pb2.DESCRIPTOR.services_by_name["MemoryService"]


async def main(settings: RouterSettings) -> None:
    """Reads the catalog once, then serves until SIGTERM, following the topology."""
    cluster, topology = await _read_catalog(settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(exporting("router", settings))
        try:
            embeds = embedder.create(settings, cluster.embedding_model, cluster.dimensions)
        except embedder.EmbedderMismatchError as error:
            raise lifecycle.StartError(str(error)) from error
        if embeds is not None:
            stack.push_async_callback(embeds.close)
        shards = Shards(settings)
        is_remote = embeds is not None and embeds.breaker is not None
        invalidations, remembered = _caches(settings, cluster, shards.timelines, stack, with_embeddings=is_remote)
        locations = remembered.locations
        stack.push_async_callback(shards.close)
        replicas, levels = Replicas(shards, topology, settings), shards.levels

        def follow(changed: Topology) -> None:
            replicas.follow(changed)
            shards.follow(changed)
            levels.override(changed.levels)

        watch = TopologyWatch(
            settings.catalog_dsn.get_secret_value(), topology, poll_s=settings.catalog_poll_s, changed=follow
        )
        levels.override(topology.levels)
        levels.dependencies += [locations.breaker, watch.breaker]
        if embeds is not None and embeds.breaker is not None:
            levels.dependencies.append(embeds.breaker)
        retries = Retries()
        reads = Reads(shards, replicas, settings, retries)
        placement, dispatch = Placement(cluster.placement), Dispatch(watch, reads, retries)
        servicer = MemoryServicer(
            Parts(
                cluster=cluster,
                placement=placement,
                embedding=Embedding(embeds, remembered.embeddings),
                dispatch=dispatch,
                request_ids=RequestIds(placement, dispatch),
                scatter=Scatter(watch, shards, retries),
                fanout=Fanout(watch, reads, retries, concurrency=settings.fanout_concurrency),
                locations=locations,
                memories=remembered.memories,
                memories_redis=remembered.memories_redis,
                searches=remembered.searches,
                flights=SingleFlight(),
                remembered=remembered,
                invalidations=invalidations,
                levels=levels,
                tokens=Tokens(cluster.token_key, levels.of, lambda: watch.topology.epoch, shards.timelines),
                watch=watch,
            )
        )
        entrance = Entrance(levels.shed)
        observed = Observed(cluster.token_key, levels)
        remembered.on_erased(lambda erased: observed.forget(lambda user: remembered.user(user) == erased))
        checks = Checks(
            cluster=cluster,
            watch=watch,
            shards=shards,
            replicas=replicas,
            locations=locations,
            embedder=embeds,
            catalog_dsn=settings.catalog_dsn.get_secret_value(),
        )
        alerts, telling = Alerts(asyncio.get_running_loop().time), Telling(settings)

        def tell(report: Report) -> None:
            for alert in alerts.observe(report):
                telling.tell(alert)

        monitor = Monitor(checks.now, tell)
        recovery = Recovery(shards, remembered, lambda: watch.topology)
        for_operators = AdminServicer(
            monitor=monitor,
            recovery=recovery,
            watch=watch,
            shards=shards,
            retries=retries,
            hedges=reads.hedges,
            locations=locations,
            replicas=replicas,
            observed=observed,
            placement=placement,
            entrance=entrance,
            catalog_dsn=settings.catalog_dsn.get_secret_value(),
        )
        metrics = RouterMetrics(watch, shards, replicas, retries, reads.hedges, remembered, observed)
        server = lifecycle.Server(
            settings,
            [
                methods_of(
                    _SERVICE,
                    servicer,
                    default_deadline_s=settings.default_deadline_s,
                    admission=entrance,
                    watch=observed,
                    begins_traces=True,
                )
            ],
            beside=admin.listener(settings, for_operators),
        )
        await stack.enter_async_context(Exposition(settings, [metrics.look]))
        await server.start()
        await server.set_serving(levels.effects().serving)

        async def obey(effects: Effects) -> None:
            await server.set_serving(effects.serving)

        healing = [partial(self_healing.run, monitor.report, recovery)] if settings.recovery == "auto" else []
        await server.run_until_stopped(
            [
                watch.run,
                replicas.run,
                Probes(shards, watch).run,
                partial(levels.run, obey),
                entrance.run,
                monitor.run,
                telling.run,
                *(_listening(invalidations, remembered) if settings.redis_url else []),
                *healing,
            ]
        )


def _caches(
    settings: RouterSettings,
    cluster: Cluster,
    timelines: Timelines,
    stack: AsyncExitStack,
    *,
    with_embeddings: bool,
) -> tuple[Invalidations, Remembered]:
    """What the router remembers, and what it hears and tells of that; closed with `stack`."""
    invalidations = Invalidations(settings, cluster.cluster_id)
    stack.push_async_callback(invalidations.close)
    link = RedisCache(settings)
    stack.push_async_callback(link.close)
    locations = LocationCache(settings, cluster.cluster_id, invalidations.alive, link)
    memories = MemoryCache(settings, invalidations.alive, timelines=timelines)
    envelopes = Envelopes(cluster.token_key)
    shared = MemoryRedis(settings, link, envelopes, cluster.cluster_id, memories)
    searches = SearchCache(settings, invalidations.alive, timelines=timelines)
    embeddings = None
    if with_embeddings:
        embeddings = EmbeddingCache(
            settings, link, envelopes, cluster.cluster_id, cluster.embedding_model, cluster.dimensions
        )
        stack.push_async_callback(embeddings.close)
    return invalidations, Remembered(locations, memories, shared, searches, invalidations, envelopes, embeddings)


def _listening(
    invalidations: Invalidations, remembered: Remembered
) -> Sequence[Callable[[], Coroutine[Any, Any, None]]]:
    return partial(invalidations.run, remembered), invalidations.keep_telling, remembered.memories_redis.run


async def _read_catalog(settings: RouterSettings) -> tuple[Cluster, Topology]:
    """What the cluster is and who owns what. Raises StartError."""
    try:
        connection = await postgres.connect(settings.catalog_dsn.get_secret_value(), what="the catalog")
        try:
            return await catalog.read_cluster(connection), await catalog.read_topology(connection)
        finally:
            await connection.close()
    except (postgres.DatabaseUnreachableError, catalog.CatalogError, asyncpg.PostgresError) as error:
        raise lifecycle.StartError(f"a router starts from the catalog: {error}. Check catalog_dsn") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m router", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file with settings; MEMSHARD_ROUTER_… variables come first")
    arguments = parser.parse_args()
    lifecycle.run("router", lambda: config.load(RouterSettings, arguments.config), main)
