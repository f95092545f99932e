"""What the steps of a request are made with: one bundle, made at start."""

from dataclasses import dataclass

from common.catalog import Cluster
from router.dispatch import Dispatch
from router.embed import Embedding
from router.fanout import Fanout
from router.invalidation import Invalidations
from router.levels import Levels
from router.location import LocationCache
from router.memories import MemoryCache
from router.place import Placement
from router.remembered import Remembered
from router.request_ids import RequestIds
from router.scatter import Scatter
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
    remembered: Remembered
    invalidations: Invalidations
    levels: Levels
    tokens: Tokens
    watch: TopologyWatch
