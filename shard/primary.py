"""The primary: whichever server of the shard's URL takes writes, and never one of an older timeline than was seen.

Every server of the URL is asked twice a second, each on a connection of its own. Of those that take writes the one with
the newest timeline is the primary: an old primary that comes back, or was never told, is left as soon as its successor
has been seen once. While there is none, the servers are asked more often, and whoever needs one waits (`available`).
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import asyncpg

from common.dsn import hosts
from common.postgres import CONNECT_ERRORS, Connection, explain
from shard.position import TIMELINE
from shard.timed_connection import TimedConnection

# Connecting to one server, or having an answer from it. A healthy one takes milliseconds.
_TIMEOUT_S = 2.0
_INTERVAL_S = 0.5
# Between questions while no server takes writes: how long a promotion is noticed late.
_SEARCH_INTERVAL_S = 0.05

_ASK = f"""
SELECT CASE WHEN NOT pg_is_in_recovery() AND NOT current_setting('transaction_read_only')::boolean
            THEN {TIMELINE} ELSE 0 END AS timeline
"""  # A constant.

# A host and its port.
Server: TypeAlias = tuple[str, int]
_AS_THE_URL_SAYS: Server = ("", 0)


class NoPrimaryError(ConnectionError):
    """No server takes writes at the moment, as far as is known."""


class PrimaryConnection(TimedConnection):
    """A connection to a server that took writes when it was made, and the timeline that it wrote."""

    timeline = 0


def timeline_of(connection: Connection) -> int:
    """The timeline of the primary that a connection was made to; 0 when that is unknown."""
    timeline: int = getattr(connection, "timeline", 0)
    return timeline


@dataclass(slots=True)
class Newest:
    """The newest timeline that a server of this shard has been seen to write. Shared by all that connect to it."""

    timeline: int = 0


def choose(timelines: Mapping[Server, int], newest: int, current: Server) -> Server | None:
    """The server to follow, given what each writes (0: nothing) and the newest timeline ever seen.

    The one with the newest timeline, if nothing newer was seen before; the current one among equals.
    """
    best = max(timelines, key=lambda server: (timelines[server], server == current))
    return best if timelines[best] >= max(newest, 1) else None


class Primary:
    """Finds the primary among the servers of a URL, and connects to it. `run` keeps it found."""

    def __init__(self, dsn: str, newest: Newest) -> None:
        self._dsn = dsn
        self._newest = newest
        self._servers: tuple[Server, ...] = tuple(dict.fromkeys(hosts(dsn))) or (_AS_THE_URL_SAYS,)
        self._asking: dict[Server, asyncpg.Connection[asyncpg.Record]] = {}
        self._timelines: dict[Server, int] = {}
        self._failures: dict[Server, str] = {}
        self.has_answered = False
        """Whether any of the servers ever said anything, be it that it lets nobody in."""
        self._current = self._servers[0]
        self._available = asyncio.Event()
        self._doubted = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def timeline(self) -> int:
        """The newest timeline seen: what is connected to an older one must not be used."""
        return self._newest.timeline

    @property
    def is_available(self) -> bool:
        """Whether a server takes writes, as far as is known."""
        return self._available.is_set()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` whenever another server, or none, takes the writes."""
        self._listeners.append(listener)

    async def available(self, timeout_s: float) -> None:
        """Waits for a server that takes writes. Raises NoPrimaryError when none has turned up in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._available.wait()
        except TimeoutError:
            raise NoPrimaryError(self._explain()) from None

    def doubt(self) -> None:
        """Something speaks against the server that takes the writes: it is asked again at once."""
        self._doubted.set()

    async def connect(self, **options: Any) -> PrimaryConnection:
        """A new connection to the primary, with asyncpg's options. Raises NoPrimaryError, or what asyncpg does."""
        if not self.is_available:
            raise NoPrimaryError(self._explain())
        try:
            connection = await self._connect(self._current, connection_class=PrimaryConnection, **options)
        except CONNECT_ERRORS:
            self.doubt()
            raise
        assert isinstance(connection, PrimaryConnection)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                connection.timeline = await connection.fetchval(_ASK)
        except BaseException:
            connection.terminate()
            raise
        if connection.timeline >= max(self._newest.timeline, 1):
            self._newest.timeline = connection.timeline
            return connection
        connection.terminate()
        self.doubt()
        raise NoPrimaryError("the server does not take writes any more")

    async def find(self, timeout_s: float) -> None:
        """Looks for the primary once, without `run`. Raises NoPrimaryError after `timeout_s`."""
        self._available.clear()
        self._timelines.clear()
        search = asyncio.create_task(self.run())
        try:
            await self.available(timeout_s)
        finally:
            search.cancel()
            with suppress(asyncio.CancelledError):
                await search

    async def run(self) -> None:
        """Keeps the primary found, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for server in self._servers:
                    group.create_task(self._watch(server))
        finally:
            self.close()

    def close(self) -> None:
        """Drops the connections that ask."""
        for connection in self._asking.values():
            connection.terminate()
        self._asking.clear()

    async def _watch(self, server: Server) -> None:
        while True:
            self._timelines[server] = await self._ask(server)
            self._choose()
            with suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S if self.is_available else _SEARCH_INTERVAL_S):
                    await self._doubted.wait()
                    # Whoever doubts has an answer of the server's in a moment, and not a storm of them.
                    await asyncio.sleep(_SEARCH_INTERVAL_S)
                    self._doubted.clear()

    async def _ask(self, server: Server) -> int:
        """The timeline that a server writes; 0 when it takes no writes."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if server not in self._asking:
                    self._asking[server] = await self._connect(server)
                timeline: int = await self._asking[server].fetchval(_ASK)
        except CONNECT_ERRORS as error:
            self._failures[server] = explain(error)
            # One kind of what a server says is said by the client: that the connection was lost.
            is_lost = isinstance(error, asyncpg.PostgresConnectionError)
            self.has_answered |= isinstance(error, asyncpg.PostgresError) and not is_lost
            if connection := self._asking.pop(server, None):
                connection.terminate()
            return 0
        self._failures[server] = "it takes no writes"
        self.has_answered = True
        return timeline

    async def _connect(self, server: Server, **options: Any) -> "asyncpg.Connection[asyncpg.Record]":
        host, port = server
        # Whether it takes writes is asked afterwards, so that a standby is an answer and no error.
        options = {"timeout": _TIMEOUT_S, "target_session_attrs": "any", **options}
        return await asyncpg.connect(self._dsn, host=host or None, port=port or None, **options)

    def _choose(self) -> None:
        if len(self._timelines) < len(self._servers):
            # Not all have answered: one that has could be an old primary, and its successor among the others.
            return
        best = choose(self._timelines, self._newest.timeline, self._current)
        if best is None:
            changed = self.is_available
            self._available.clear()
        else:
            changed = not self.is_available or best != self._current or self._timelines[best] > self._newest.timeline
            self._current, self._newest.timeline = best, self._timelines[best]
            self._available.set()
        if changed:
            for listener in self._listeners:
                listener()

    def _explain(self) -> str:
        known = [f"{host}:{port}: {why}" for (host, port), why in self._failures.items()]
        return "no server takes writes: " + ("; ".join(known) or "none has answered yet")
