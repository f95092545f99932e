"""What the clients return: frozen dataclasses, with enums and datetimes in place of wire values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from typing import Any, Final, Protocol, TypeAlias

from memshard.errors import MemshardError
from memshard.ids import new_id

Metadata: TypeAlias = Mapping[str, Any]
"""JSON-like: str, int, float, bool, None, and lists and str-keyed dicts of these. Numbers are doubles on the wire."""


class SupportsToList(Protocol):
    """An array of numpy, torch or the like."""

    def tolist(self) -> Any:
        """Its values as Python floats."""


Embedding: TypeAlias = Sequence[float] | SupportsToList
"""A vector of the cluster's dimension."""


class Unset(Enum):
    """The type of UNSET."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""In place of a field that an update leaves as it is, since None is a value of its own."""


class _WireEnum(IntEnum):
    """Numbered as in the wire contract. A value that only a newer server knows reads as UNSPECIFIED."""

    @classmethod
    def _missing_(cls, value: object) -> _WireEnum | None:
        return cls(0) if isinstance(value, int) else None


class MemoryType(_WireEnum):
    """What kind of thing is remembered."""

    UNSPECIFIED = 0
    EPISODIC = 1
    SEMANTIC = 2
    PROCEDURAL = 3
    WORKING = 4


class EmbeddingState(_WireEnum):
    """Whether a memory can be found by meaning yet."""

    UNSPECIFIED = 0
    READY = 1
    PENDING = 2


class Durability(_WireEnum):
    """What an acknowledged write survives: LOCAL is on the primary's disk, QUORUM on a standby's as well."""

    UNSPECIFIED = 0
    LOCAL = 1
    QUORUM = 2


class DegradationLevel(_WireEnum):
    """How much of the service is offered at present; NORMAL is all of it."""

    UNSPECIFIED = 0
    NORMAL = 1
    REDUCED = 2
    ESSENTIAL = 3
    READONLY = 4
    MAINTENANCE = 5


class ScoreKind(_WireEnum):
    """What scores mean: COSINE similarity (-1 to 1), TEXT_RANK (0 and more), FUSED, or mere RECENCY."""

    UNSPECIFIED = 0
    COSINE = 1
    TEXT_RANK = 2
    FUSED = 3
    RECENCY = 4


class SearchMode(_WireEnum):
    """How a query is matched: by meaning, by words, or both."""

    UNSPECIFIED = 0
    SEMANTIC = 1
    KEYWORD = 2
    HYBRID = 3


class ReadLevel(_WireEnum):
    """How fresh an answer must be.

    STRONG: read from the primary. SESSION: with all that this client has written, or joined, of the user. With
    BOUNDED_STALENESS nothing is missing that is older than `max_staleness_s`. EVENTUAL: whatever a server has.
    """

    UNSPECIFIED = 0
    STRONG = 1
    SESSION = 2
    BOUNDED_STALENESS = 3
    EVENTUAL = 4


@dataclass(frozen=True, slots=True)
class NewMemory:
    """A memory to store, one of many. The fields are those of `store`.

    Its id is made with it: storing the same object again, after a call whose outcome is not known, stores it once.
    """

    user_id: str
    content: str
    id: str = field(default_factory=new_id)
    agent_id: str = ""
    session_id: str = ""
    type: MemoryType = MemoryType.EPISODIC
    metadata: Metadata | None = None
    importance: float | None = None
    embedding: Embedding | None = None
    embedding_model: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """One thing remembered; it belongs to exactly one user.

    `importance` is 0 to 1. `embedding` is empty unless it was asked for. Times are in UTC; `expire_time` is None for
    a memory that stays. `version` is 1 when stored and grows with each update.
    """

    id: str
    user_id: str
    content: str
    type: MemoryType = MemoryType.EPISODIC
    agent_id: str = ""
    session_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    importance: float | None = None
    embedding: tuple[float, ...] = ()
    embedding_model: str = ""
    embedding_state: EmbeddingState = EmbeddingState.UNSPECIFIED
    create_time: datetime | None = None
    update_time: datetime | None = None
    expire_time: datetime | None = None
    version: int = 0


@dataclass(frozen=True, slots=True)
class WriteReceipt:
    """What a write leaves behind. The token is opaque: whoever passes it to a read sees this write."""

    consistency_token: bytes = b""
    durability: Durability = Durability.UNSPECIFIED
    degradation_level: DegradationLevel = DegradationLevel.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """A shard that is missing from an answer, and why."""

    shard_id: str
    error: MemshardError


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """How many shards were asked and answered, and why the others did not."""

    total: int = 0
    succeeded: int = 0
    failed: tuple[ShardFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadReport:
    """Where an answer came from, and what it leaves out. `served_by`: primary, replica, cache, fallback."""

    served_by: tuple[str, ...] = ()
    shards: ShardSummary = field(default_factory=ShardSummary)
    degradation_level: DegradationLevel = DegradationLevel.UNSPECIFIED

    @property
    def partial(self) -> bool:
        """Whether the answer leaves something out, because a shard did not answer."""
        return bool(self.shards.failed) or self.shards.succeeded < self.shards.total


@dataclass(frozen=True, slots=True)
class GetResult:
    """A memory, and where the answer came from."""

    memory: Memory
    report: ReadReport


@dataclass(frozen=True, slots=True)
class StoreResult:
    """The memory as stored, without its embedding."""

    memory: Memory
    receipt: WriteReceipt
    deleted: bool = False
    """This store is the repetition of one whose memory has been deleted since: nothing is stored. The id stays taken
    for a day, so that late retries bring nothing back."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The memory after the change, without its embedding."""

    memory: Memory
    receipt: WriteReceipt


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What became of one memory of a batch: it is stored, or `error` says why not."""

    id: str
    error: MemshardError | None = None
    deleted: bool = False
    """It was stored before and has been deleted since: nothing is stored."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One outcome for each memory, in the order given. Some may have failed: `failed` is empty when none has."""

    outcomes: tuple[BatchOutcome, ...]
    receipt: WriteReceipt

    @property
    def failed(self) -> tuple[BatchOutcome, ...]:
        """The outcomes with an error."""
        return tuple(outcome for outcome in self.outcomes if outcome.error is not None)


@dataclass(frozen=True, slots=True)
class EraseResult:
    """How much was erased."""

    memories_erased: int
    versions_erased: int
    receipt: WriteReceipt


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """Whether there was a memory to delete: true or false itself."""

    deleted: bool
    receipt: WriteReceipt

    def __bool__(self) -> bool:
        return self.deleted


@dataclass(frozen=True, slots=True)
class MemoryPage:
    """One page of a listing, newest first. The listing is over when `next_page_token` is empty."""

    memories: tuple[Memory, ...]
    next_page_token: str
    report: ReadReport


@dataclass(frozen=True, slots=True)
class VersionPage:
    """One page of a memory's versions, newest first. The listing is over when `next_page_token` is empty."""

    versions: tuple[Memory, ...]
    next_page_token: str
    degradation_level: DegradationLevel = DegradationLevel.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class ScoredMemory:
    """A memory, and how well it matched; ScoreKind says what the score means."""

    memory: Memory
    score: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best matches, best first. Look at `report.partial` before taking an absence for a fact."""

    results: tuple[ScoredMemory, ...]
    score_kind: ScoreKind
    report: ReadReport
