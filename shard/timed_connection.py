"""A connection whose server ends a statement by itself, once nobody can be waiting for it any more.

A read whose caller leaves is cancelled by this process. That is no help when this process lies still, or when the work
is a write, which goes on without its caller: then the server's own `statement_timeout` is what bounds it. It ends
before a commit begins (PostgreSQL's postgres.c, `finish_xact_command`), so that it never cuts one short.
"""

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import asyncpg

from shard.statements import observed

if TYPE_CHECKING:
    _Base: TypeAlias = asyncpg.Connection[asyncpg.Record]
else:
    _Base = asyncpg.Connection

T = TypeVar("T")

# What asyncpg lets through, or makes, of messages that are none of PostgreSQL's.
_GARBLED = (BufferError, LookupError, UnicodeDecodeError, asyncpg.UnknownPostgresError)

# Seconds. Few, since each change costs a round trip: those who are in a hurry, those who wait as long as callers do by
# default, and the longest that any statement may take.
_STEPS_S = (1, 10)
LONGEST_S = 30
# Whoever waited for the statement waits for this too, and what it asks for is nothing.
_SETTLE_S = 0.5
_UNKNOWN = 0


class TimedConnection(_Base):
    """Connections begin with the longest timeout, which the pool asks for when it makes them."""

    statement_timeout_s = LONGEST_S
    _left_midway = False

    def leave_midway(self) -> None:
        """Its use ended by an error or by a cancellation, maybe between two messages of one statement.

        asyncpg prepares a statement without a Sync, so that the server, waiting for the rest, keeps a transaction open
        and its locks held: for as long as nobody else uses the connection.
        """
        self._left_midway = True

    async def settle(self) -> None:
        """Ends what was left midway: a round trip then, and nothing otherwise.

        Raises ConnectionError when the server does not answer at once: the connection is not to be used again.
        """
        if not self._left_midway:
            return
        try:
            async with asyncio.timeout(_SETTLE_S):
                await self.execute("SELECT")
        except TimeoutError:
            raise ConnectionAbortedError("the server does not answer") from None
        self._left_midway = False

    async def limit_statements(self, remaining_s: float) -> None:
        """Has the server end statements after `remaining_s` seconds, rounded up to one of a few steps."""
        wanted_s = next((step for step in _STEPS_S if remaining_s <= step), LONGEST_S)
        if wanted_s != self.statement_timeout_s:
            # Cut off in the middle, nobody knows which of the two it is.
            self.statement_timeout_s = _UNKNOWN
            await super().execute("SELECT set_config('statement_timeout', $1, false)", f"{wanted_s}s")
            self.statement_timeout_s = wanted_s

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        return await _answer(query, super().execute(query, *args, timeout=timeout))

    async def executemany(self, command: str, args: Any, *, timeout: float | None = None) -> None:
        return await _answer(command, super().executemany(command, args, timeout=timeout))

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        return await _answer(query, super().fetch(query, *args, **options))

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        return await _answer(query, super().fetchval(query, *args, **options))

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        return await _answer(query, super().fetchrow(query, *args, **options))


async def _answer(query: str, asking: Awaitable[T]) -> T:
    """What the server answers. Raises what asyncpg does; InternalClientError for what no server would say."""
    try:
        return await observed(query, asking)
    except _GARBLED as error:
        raise asyncpg.InternalClientError("the answer is not PostgreSQL's") from error
