"""Callers that store, change, delete and read memories of their own users, and know what must be there."""

import asyncio
import itertools
import time
from dataclasses import dataclass, field

from memshard import AsyncMemoryClient, MemshardError, NotFound, ReadLevel
from tests.support.load import Timeline


@dataclass
class Writers:
    """`users` shared out among `count` writers; of each memory it is known exactly what it must be."""

    address: str
    users: list[str]
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[MemshardError] = field(default_factory=list)
    """Calls that failed, after what the client does about it by itself."""
    slowest_s: float = 0.0
    writes: Timeline = field(default_factory=Timeline)
    wrong: list[str] = field(default_factory=list)
    """Reads that did not show what their writer had been told before."""
    pause_s: float = 0.0
    """Between a writer's calls."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, count: int = 4) -> None:
        """Until `stop`."""
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._write(self.users[number::count]))

    def stop(self) -> None:
        """Ends it after the calls under way."""
        self._stop.set()

    async def found(self) -> dict[str, dict[str, str]]:
        """What there is, by user and id."""
        async with AsyncMemoryClient(self.address) as client:
            return {
                user: {memory.id: memory.content async for memory in client.iter_memories(user)}
                for user in self.expected
            }

    async def _write(self, users: list[str]) -> None:
        async with AsyncMemoryClient(self.address) as client:
            for number, user in zip(itertools.count(), itertools.cycle(users), strict=False):
                if self._stop.is_set():
                    return
                mine = self.expected.setdefault(user, {})
                began = time.monotonic()
                try:
                    await self._write_once(client, user, mine, number)
                    self.writes.mark()
                except MemshardError as error:
                    self.failures.append(error)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                await asyncio.sleep(self.pause_s)

    async def _write_once(self, client: AsyncMemoryClient, user: str, mine: dict[str, str], number: int) -> None:
        ids = list(mine)
        what = number // len(self.users)
        if what % 5 == 3 and ids:
            content = f"changed {number}"
            await client.update(user, ids[0], content=content)
            mine[ids[0]] = content
        elif what % 5 == 4 and len(ids) > 3:
            await client.delete(user, ids[1])
            del mine[ids[1]]
        else:
            content = f"{user} remembers {number}"
            memory_id = (await client.store(user, content)).memory.id
            mine[memory_id] = content
            await self._read_back(client, user, memory_id, content)

    async def _read_back(self, client: AsyncMemoryClient, user: str, memory_id: str, content: str) -> None:
        """By whichever server has it, with the token of the write."""
        try:
            found = await client.get(memory_id, user_id=user, read=ReadLevel.SESSION)
        except NotFound:
            self.wrong.append(f"{memory_id} was not there for who had written it")
        else:
            if found.content != content:
                self.wrong.append(f"{memory_id} was another")
