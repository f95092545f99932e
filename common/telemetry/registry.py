"""The metrics of this process: one registry, and the instruments that the path of a request counts with.

What is kept somewhere anyway, like the state of a breaker, is not counted here a second time: it is read when somebody
looks (`common.telemetry.exposition`). Names and units are as Prometheus wants them; the labels of an instrument are
few and known beforehand, and never what a caller chose (docs/observability.md lists them).
"""

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from common.telemetry.instruments import Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

# Seconds. The objectives, 100 ms for a read and 200 ms for a write, are two of them, so that their share is exact.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0)
_BYTES = tuple(float(4**power * 1024) for power in range(7))

OPERATIONS = Counter(
    "memory_operations", "Calls that ended, by operation and gRPC status.", ("operation", "status"), registry=REGISTRY
)
OPERATION_ERRORS = Counter(
    "memory_operation_errors", "Calls that failed, by operation and reason.", ("operation", "reason"), registry=REGISTRY
)
OPERATION_DURATION = Histogram(
    "memory_operation_duration_seconds",
    "How long calls took that were answered OK.",
    ("operation",),
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
IN_FLIGHT = Gauge("memory_operations_in_flight", "Calls that are being worked on.", ("operation",), registry=REGISTRY)
# OpenTelemetry's rpc.server.call.duration, as its names become Prometheus'.
_RPC_LABELS = ("rpc_system_name", "rpc_method", "rpc_response_status_code")
RPC_SERVER_DURATION = Histogram(
    "rpc_server_call_duration_seconds",
    "How long calls took, by OpenTelemetry's semantic names.",
    _RPC_LABELS,
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
# The same of rpc.client.call.duration. Servers are told apart by memory_server_call_duration_seconds.
RPC_CLIENT_DURATION = Histogram(
    "rpc_client_call_duration_seconds",
    "How long calls to shards and replicas took, by OpenTelemetry's semantic names.",
    _RPC_LABELS,
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
SERVER_CALLS = Counter(
    "memory_server_calls",
    "Calls of a router to a shard or replica, by kind and gRPC status; those that a guard refused are not among them.",
    ("server", "kind", "status"),
    registry=REGISTRY,
)
SERVER_CALL_DURATION = Histogram(
    "memory_server_call_duration_seconds",
    "How long a shard or replica took, as the router saw it.",
    ("server", "kind"),
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
BREAKER_OPENED = Counter(
    "memory_breaker_opened",
    "How often a circuit breaker opened. One that opens and half-opens by turns is seldom seen open.",
    ("name", "kind"),
    registry=REGISTRY,
)
SHED = Counter(
    "memory_requests_shed",
    "Requests refused for too much to do: at a router's entrance, before a server, or at the server's own admission.",
    ("at",),
    registry=REGISTRY,
)
RETRIES = Counter(
    "memory_retries", "Calls that were tried again, and reads that went on when a server failed.", registry=REGISTRY
)
RETRIES_REFUSED = Counter(
    "memory_retries_refused", "Calls and reads that did not, because the budget was spent.", registry=REGISTRY
)
CACHE_REQUESTS = Counter(
    "memory_cache_requests",
    "Looks into the caches, by layer and result: hit, miss, or unavailable.",
    ("layer", "result"),
    registry=REGISTRY,
)
EMBEDDING_DURATION = Histogram(
    "memory_embedding_duration_seconds",
    "How long the embedder took, by outcome.",
    ("outcome",),
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
BATCH_SIZE = Histogram(
    "memory_batch_size", "Memories in a batch.", buckets=(1, 5, 10, 25, 50, 100, 250, 500), registry=REGISTRY
)
STORES_GATHERED = Histogram(
    "memory_stores_gathered",
    "Stores that shared a statement and its commit.",
    buckets=(1, 2, 5, 10, 20, 50),
    registry=REGISTRY,
)
CONTEXT_SIZE = Histogram(
    "agent_context_size_bytes",
    "Size of the answers to reads, as agents receive them.",
    ("operation",),
    buckets=_BYTES,
    registry=REGISTRY,
)
RELEVANCE = Histogram(
    "agent_memory_relevance_score",
    "Score of the best result of a search that found anything, by kind of score.",
    ("score_kind",),
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    registry=REGISTRY,
)
STATEMENTS = Histogram(
    "memory_database_statement_duration_seconds",
    "How long the database took for one statement, by what it does.",
    ("statement",),
    buckets=LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
OWN_INDEX_SEARCHES = Counter(
    "memory_own_index_searches",
    "Searches by meaning of users with an index of their own, by how they were answered: index, or exact.",
    ("answered",),
    registry=REGISTRY,
)
OWN_INDEX_BUILDS = Counter(
    "memory_own_index_builds",
    "Large users' own indexes, by what became of making them: made, or failed.",
    ("outcome",),
    registry=REGISTRY,
)
OWN_INDEX_BUILD_DURATION = Histogram(
    "memory_own_index_build_duration_seconds",
    "How long making a large user's own index took.",
    buckets=(1, 5, 15, 60, 300, 900, 3600),
    registry=REGISTRY,
)
WRITES = Counter(
    "memory_writes_acknowledged", "Writes acknowledged, by what their receipt promises.", ("durability",),
    registry=REGISTRY,
)  # fmt: skip
TRACES_DROPPED = Counter(
    "memory_traces_dropped",
    "Parts of traces that were to be kept for what became of them, and were too many, by cause: failed, slow, or shed.",
    ("cause",),
    registry=REGISTRY,
)
