"""The Python client of memshard, the sharded memory cluster for AI agents.

    with MemoryClient("localhost:50051") as client:
        stored = client.store("alice", "Prefers tea to coffee.")
        for match in client.search("What does she drink?", user_id="alice").results:
            print(match.score, match.memory.content)

`AsyncMemoryClient` is the same for asyncio. Failed calls raise the exceptions of `memshard.errors`.
"""

from memshard.aio import AsyncMemoryClient
from memshard.client import MemoryClient
from memshard.errors import (
    Aborted,
    AlreadyExists,
    Ambiguous,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    MemshardError,
    NotFound,
    OutcomeUnknown,
    PermissionDenied,
    ReadOnly,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    VersionMismatch,
)
from memshard.ids import new_id
from memshard.types import (
    DegradationLevel,
    DeleteResult,
    Durability,
    Embedding,
    EmbeddingState,
    Memory,
    MemoryPage,
    MemoryType,
    Metadata,
    ReadReport,
    ScoredMemory,
    ScoreKind,
    SearchResult,
    ShardFailure,
    ShardSummary,
    StoreResult,
    WriteReceipt,
)

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Ambiguous",
    "AsyncMemoryClient",
    "Cancelled",
    "DeadlineExceeded",
    "DegradationLevel",
    "DeleteResult",
    "Durability",
    "Embedding",
    "EmbeddingState",
    "FailedPrecondition",
    "FieldViolation",
    "InternalError",
    "InvalidArgument",
    "Memory",
    "MemoryClient",
    "MemoryPage",
    "MemoryType",
    "MemshardError",
    "Metadata",
    "NotFound",
    "OutcomeUnknown",
    "PermissionDenied",
    "ReadOnly",
    "ReadReport",
    "ResourceExhausted",
    "ScoreKind",
    "ScoredMemory",
    "SearchResult",
    "ShardFailure",
    "ShardSummary",
    "StoreResult",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "VersionMismatch",
    "WriteReceipt",
    "new_id",
]
