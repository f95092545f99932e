"""What the steps of a request are made with: one bundle, made at start."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from common.catalog import Cluster
from router.dispatch import Dispatch
from router.embed import Embedding
from router.fanout import Fanout
from router.invalidation import Invalidations
from router.levels import Levels
from router.location import LocationCache
from router.memories import MemoryCache
from router.memories_redis import MemoryRedis
from router.place import Placement
from router.remembered import Remembered
from router.request_ids import RequestIds
from router.scatter import Scatter
from router.search_cache import SearchCache
from router.single_flight import SingleFlight
from router.tokens import Tokens
from router.topology_watch import TopologyWatch


@dataclass(frozen=True, slots=True)
class Parts:
    """The router's parts."""

    cluster: Cluster
    placement: Placement
    embedding: Embedding
    dispatch: Dispatch
    request_ids: RequestIds
    scatter: Scatter
    fanout: Fanout
    locations: LocationCache
    memories: MemoryCache
    memories_redis: MemoryRedis
    searches: SearchCache
    flights: SingleFlight[Hashable, Any]
    """Gets, and searches of one user, that are under way."""
    remembered: Remembered
    invalidations: Invalidations
    levels: Levels
    tokens: Tokens
    watch: TopologyWatch
