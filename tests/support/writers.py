"""Callers that store, change, delete and read memories of their own users, and know what must be there."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from memshard import AsyncMemoryClient, MemshardError, NotFound, ReadLevel
from memshard.ids import new_id
from tests.support.history import History
from tests.support.load import Timeline

T = TypeVar("T")

_PAUSE_S = 0.1


@dataclass(frozen=True)
class Answered:
    """A change or a deletion with the request id that it was asked for by, and what was answered."""

    request_id: str
    memory_id: str
    content: str | None
    """None: it was deleted."""
    answer: int | bool
    """The version that it made; of a deletion, whether there was anything to delete."""


@dataclass
class Writers:
    """`users` shared out among `count` writers; of each memory it is known exactly what it must be."""

    address: str
    users: list[str]
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)
    """The same with all that is on its way, by user, for those who read meanwhile. What is expected from the start was
    stored before."""
    answered: dict[str, dict[str, Answered]] = field(default_factory=dict)
    """The last change and the last deletion of each user."""
    failures: list[MemshardError] = field(default_factory=list)
    """Calls that failed, after what the client does about it by itself."""
    slowest_s: float = 0.0
    writes: Timeline = field(default_factory=Timeline)
    wrong: list[str] = field(default_factory=list)
    """Reads that did not show what their writer had been told before."""
    pause_s: float = 0.0
    """Between a writer's calls."""
    patience_s: float = 0.0
    """For how long a call that failed, and may succeed later, is made again with the same ids."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.histories = {user: History() for user in self.users}
        for user, mine in self.expected.items():
            for memory_id, content in mine.items():
                self.histories[user].asks(memory_id, content)
                self.histories[user].settled(memory_id, content)

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
                    await self._write_once(client, user, mine, number, number // len(users))
                    self.writes.mark()
                except MemshardError as error:
                    self.failures.append(error)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                await asyncio.sleep(self.pause_s)

    async def _write_once(
        self, client: AsyncMemoryClient, user: str, mine: dict[str, str], number: int, turn: int
    ) -> None:
        ids, history = list(mine), self.histories[user]
        if turn % 5 == 3 and ids:
            content = f"changed {number}"
            history.asks(ids[0], content)
            request_id = new_id()
            changed = await self._settled(lambda: client.update(user, ids[0], content=content, request_id=request_id))
            history.settled(ids[0], content)
            mine[ids[0]] = content
            self._was_answered(user, "update", Answered(request_id, ids[0], content, changed.memory.version))
        elif turn % 5 == 4 and len(ids) > 3:
            history.asks(ids[1], None)
            request_id = new_id()
            gone = await self._settled(lambda: client.delete(user, ids[1], request_id=request_id))
            history.settled(ids[1], None)
            del mine[ids[1]]
            self._was_answered(user, "delete", Answered(request_id, ids[1], None, gone.deleted))
        else:
            content = f"{user} remembers {number}"
            memory_id = new_id()
            history.asks(memory_id, content)
            await self._settled(lambda: client.store(user, content, id=memory_id))
            history.settled(memory_id, content)
            mine[memory_id] = content
            await self._read_back(client, user, memory_id, content)

    async def _settled(self, call: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return await call()
            except MemshardError as error:
                if not error.retryable or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_PAUSE_S)

    def _was_answered(self, user: str, kind: str, answered: Answered) -> None:
        self.answered.setdefault(user, {})[kind] = answered

    async def _read_back(self, client: AsyncMemoryClient, user: str, memory_id: str, content: str) -> None:
        """By whichever server has it, with the token of the write."""
        try:
            found = await self._settled(lambda: client.get(memory_id, user_id=user, read=ReadLevel.SESSION))
        except NotFound:
            self.wrong.append(f"{memory_id} was not there for who had written it")
        else:
            if found.content != content:
                self.wrong.append(f"{memory_id} was another")
