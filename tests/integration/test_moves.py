"""Moving slots between shards while they are written."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest_asyncio

from memshard import AsyncMemoryClient, MemshardError
from tests.support.cluster import LocalCluster
from tests.support.moving import Slots

_USERS = [f"mover-{number}" for number in range(60)]


@dataclass
class Writers:
    """Callers that store, change and delete memories of their own users, and know what must be there."""

    address: str
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[MemshardError] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, count: int = 4) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._write(_USERS[number::count]))

    def stop(self) -> None:
        self._stop.set()

    async def _write(self, users: list[str]) -> None:
        async with AsyncMemoryClient(self.address) as client:
            for number, user in zip(itertools.count(), itertools.cycle(users), strict=False):
                if self._stop.is_set():
                    return
                mine = self.expected.setdefault(user, {})
                try:
                    await self._write_once(client, user, mine, number)
                except MemshardError as error:
                    self.failures.append(error)

    async def _write_once(self, client: AsyncMemoryClient, user: str, mine: dict[str, str], number: int) -> None:
        ids = list(mine)
        if number % 5 == 3 and ids:
            content = f"changed {number}"
            await client.update(user, ids[0], content=content)
            mine[ids[0]] = content
        elif number % 5 == 4 and len(ids) > 3:
            await client.delete(user, ids[1])
            del mine[ids[1]]
        else:
            content = f"{user} remembers {number}"
            mine[(await client.store(user, content)).memory.id] = content

    async def found(self) -> dict[str, dict[str, str]]:
        async with AsyncMemoryClient(self.address) as client:
            return {
                user: {memory.id: memory.content async for memory in client.iter_memories(user)}
                for user in self.expected
            }


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slots() -> AsyncIterator[Slots]:
    async with LocalCluster(shards=2) as cluster:
        yield Slots(cluster, {"rollback_window_s": 0, "max_slots": 4096, "log_level": "debug"})


async def test_a_range_moves_while_it_is_written(slots: Slots) -> None:
    writers = Writers(slots.cluster.address)
    async with asyncio.TaskGroup() as group:
        group.create_task(writers.run())
        await asyncio.sleep(1)
        before = await slots.topology()
        events = await slots.move("drain", "--shard", "shard-1")
        writers.stop()
    print([event for event in events if "pause_ms" in event or "aborted_after_ms" in event])
    after = await slots.topology()
    assert (before.slot_count("shard-1"), after.slot_count("shard-1")) == (8192, 0)
    assert await writers.found() == writers.expected
    assert writers.failures == []
    assert await slots.left_over() == []
    rows = await slots.rows()
    assert not any(rows["shard-1"].values())
