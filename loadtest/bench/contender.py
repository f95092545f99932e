"""What a contender of the benchmark can be asked to do."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from loadtest.bench.workload import Vector


class Endpoint(TypedDict, total=False):
    """Where a contender is: what of this it needs, it has."""

    dsn: str
    table: str
    column: str
    address: str
    cluster_id: str
    shard_id: str
    epoch: int
    host: str
    port: int
    user: str
    password: str
    database: str


@dataclass(frozen=True, slots=True)
class Row:
    """A memory to store."""

    user: str
    id: str
    content: str
    embedding: Vector


@dataclass(slots=True)
class Watch:
    """What answers said besides: a measurement under a degradation level is none."""

    levels: Counter[str] = field(default_factory=Counter)


class Contender(Protocol):
    """One way to keep memories. `caller` says who of a worker's callers asks."""

    watch: Watch

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        """Connects, ready for so many callers at once."""
        ...

    async def close(self) -> None: ...

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        """The ids of the memories nearest to `query`, with contents and scores, which are thrown away."""
        ...

    async def store(self, caller: int, row: Row) -> None:
        """Stores one memory; it is on disk when this returns."""
        ...

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        """One memory, without its embedding."""
        ...

    async def get_again(self, caller: int, user: str, memory_id: str) -> Any:
        """One of a few that all ask for again and again, which need not be the newest state."""
        ...

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        """Stores many memories, the fastest way there is."""
        ...
