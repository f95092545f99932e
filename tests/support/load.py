"""Writers and readers that never stop, with what became of each call and when: for tests of what they notice."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from memshard import (
    AsyncMemoryClient,
    DeadlineExceeded,
    Durability,
    MemshardError,
    ReadLevel,
    StoreResult,
    Unavailable,
)
from memshard.ids import new_id

# Shorter than a person would wait, and longer than any failover should take.
_TIMEOUT_S = 5.0
_BETWEEN_READS_S = 0.01
_EMBEDDING = [1.0, 0.0, 0.0]


@dataclass
class Timeline:
    """When something succeeded, in seconds of the monotonic clock."""

    times: list[float] = field(default_factory=list)

    def mark(self) -> None:
        self.times.append(time.monotonic())

    def longest_gap_s(self, begin: float, end: float) -> float:
        """The longest time without a success between two moments."""
        inside = [begin, *(at for at in self.times if begin < at < end), end]
        return max(later - earlier for earlier, later in pairwise(inside))


@dataclass
class Load:
    """Eight writers, each storing one memory after the other until it is acknowledged, and two readers, whose reads
    need no primary: one with SESSION, one with EVENTUAL.

    Each has a client of its own, as agents do, which are processes on many machines. For a cluster whose callers bring
    embeddings of three numbers.
    """

    address: str
    users: int = 8
    readers: int = 2
    acknowledged: dict[str, dict[str, str]] = field(default_factory=dict)
    """Content of each acknowledged memory by user and id."""
    durabilities: Counter[Durability] = field(default_factory=Counter)
    last_durability: Durability = Durability.UNSPECIFIED
    failures: list[MemshardError] = field(default_factory=list)
    """Every call that failed, after what the client does about it by itself."""
    read_failures: list[MemshardError] = field(default_factory=list)
    """The reads among them."""
    writes: Timeline = field(default_factory=Timeline)
    reads: Timeline = field(default_factory=Timeline)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Until `stop`."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.users):
                group.create_task(self._write(f"writer-{number}"))
            for number in range(self.readers):
                level = (ReadLevel.SESSION, ReadLevel.EVENTUAL)[number % 2]
                group.create_task(self._read(f"writer-{number}", level))

    def stop(self) -> None:
        """Ends it after the calls under way."""
        self._stop.set()

    def total(self) -> int:
        return sum(map(len, self.acknowledged.values()))

    async def lost_and_doubled(self) -> tuple[int, int]:
        """How many acknowledged memories are not there, or not what they were; how many are there that nobody was told
        of, or more than once.
        """
        lost = doubled = 0
        async with AsyncMemoryClient(self.address) as client:
            for user, expected in self.acknowledged.items():
                found = [memory async for memory in client.iter_memories(user)]
                contents = {memory.id: memory.content for memory in found}
                lost += sum(contents.get(memory_id) != content for memory_id, content in expected.items())
                doubled += len(found) - len(contents) + len(contents.keys() - expected.keys())
        return lost, doubled

    async def _write(self, user: str) -> None:
        mine = self.acknowledged.setdefault(user, {})
        async with AsyncMemoryClient(self.address, timeout_s=_TIMEOUT_S) as client:
            while not self._stop.is_set():
                memory_id, content = new_id(), f"{user} remembers number {len(mine)}"
                result = await self._stored(client, user, memory_id, content)
                mine[memory_id] = content
                self.durabilities[result.receipt.durability] += 1
                self.last_durability = result.receipt.durability
                self.writes.mark()

    async def _stored(self, client: AsyncMemoryClient, user: str, memory_id: str, content: str) -> StoreResult:
        """Until it is acknowledged, the last one too: whether it is there must not be a question."""
        while True:
            try:
                return await client.store(user, content, id=memory_id, embedding=_EMBEDDING)
            except (Unavailable, DeadlineExceeded) as error:
                self.failures.append(error)

    async def _read(self, user: str, level: ReadLevel) -> None:
        async with AsyncMemoryClient(self.address, timeout_s=_TIMEOUT_S) as client:
            while not self._stop.is_set():
                try:
                    await client.list_memories(user, page_size=10, read=level)
                    self.reads.mark()
                except (Unavailable, DeadlineExceeded) as error:
                    self.failures.append(error)
                    self.read_failures.append(error)
                # Readers are to notice an outage, not to use up the machine.
                await asyncio.sleep(_BETWEEN_READS_S)
