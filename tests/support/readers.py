"""Callers that list and search what others write, and compare it with what its writers were told."""

import asyncio
import itertools
from dataclasses import dataclass, field

from memshard import AsyncMemoryClient, MemshardError, ReadLevel
from tests.support.history import found_of
from tests.support.writers import Writers

# A reader lists everything that a user has, and searches it, once in so many times.
_WHOLE_EVERY = 10


@dataclass
class Readers:
    """Readers of what `writers` write, by turns at each level. What they find wrong is in the histories."""

    writers: Writers
    reads: int = 0
    failures: list[MemshardError] = field(default_factory=list)
    incomplete: int = 0
    stop: bool = False
    pause_s: float = 0.005
    """Between a reader's turns."""

    async def run(self, count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._read(self.writers.users[number::count], number))

    async def _read(self, users: list[str], number: int) -> None:
        level = (ReadLevel.STRONG, ReadLevel.SESSION, ReadLevel.EVENTUAL)[number % 3]
        async with AsyncMemoryClient(self.writers.address) as client:
            for turn, user in enumerate(itertools.cycle(users)):
                whole = turn % _WHOLE_EVERY == 0
                try:
                    await self._listed(client, user, level, whole=whole)
                    await self._searched(client, None, level)
                    self.reads += 2
                    if whole:
                        await self._searched(client, user, level)
                        self.reads += 1
                except MemshardError as error:
                    self.failures.append(error)
                if self.stop:
                    return
                await asyncio.sleep(self.pause_s)

    async def _listed(self, client: AsyncMemoryClient, user: str, level: ReadLevel, *, whole: bool) -> None:
        history = self.writers.histories[user]
        since = history.moment()
        if whole:
            memories = [memory async for memory in client.iter_memories(user, read=level)]
        else:
            memories = list((await client.list_memories(user, page_size=20, read=level)).memories)
        # This session has written nothing, so that a replica may answer it with what was.
        history.check(map(found_of, memories), whole=whole, since=since, fresh=level is ReadLevel.STRONG)

    async def _searched(self, client: AsyncMemoryClient, user: str | None, level: ReadLevel) -> None:
        """With a user by the level; of all users, what was ever asked for."""
        histories = self.writers.histories
        since = histories[user].moment() if user else {}
        answer = await client.search("what is remembered?", user_id=user, limit=5, read=level if user else None)
        self.incomplete += answer.report.partial
        memories = [result.memory for result in answer.results]
        for owner in {memory.user_id for memory in memories}:
            theirs = [found_of(memory) for memory in memories if memory.user_id == owner]
            fresh = owner == user and level is ReadLevel.STRONG
            histories[owner].check(theirs, whole=False, since=since if fresh else {}, fresh=fresh)
