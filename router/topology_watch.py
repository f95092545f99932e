"""The router's snapshot of the topology, kept fresh by the catalog's notifications and by polling.

When the catalog is away the snapshot stays as it is and the router serves on: slots move seldom, and a shard that no
longer owns one says so itself, and says who does: what shards have told is laid over the snapshot until the catalog
tells it too.
"""

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress

from common import catalog, logs, postgres
from common.breaker_log import logged
from common.breaker_settings import CATALOG
from common.deadline import Deadline
from common.departure import Departure
from common.errors import Unavailable
from common.postgres import Connection
from common.topology import Topology
from router.moving import Moving

_log = logs.get_logger("topology")

_BACKOFF_S = (0.2, 5.0)
# Longest that a request waits for a newer topology before it tries again with what there is.
_REFRESH_TIMEOUT_S = 2.0
# Longest from the beginning of a connection to the end of the first look by it.
_BEGIN_TIMEOUT_S = postgres.CONNECT_TIMEOUT_S + _REFRESH_TIMEOUT_S

_EXPECTED = (postgres.DatabaseUnreachableError, catalog.CatalogError, *postgres.CONNECT_ERRORS)


class TopologyWatch:
    """Holds the newest topology seen. `run` keeps it fresh; `refresh` asks for a look right now."""

    def __init__(self, dsn: str, first: Topology, *, poll_s: float, changed: Callable[[Topology], None]) -> None:
        self._dsn = dsn
        self._poll_s = poll_s
        self._changed = changed
        self._topology = self._catalogs = first
        # What shards told that the catalog's snapshot does not know, by first slot, last slot and source.
        self._told: dict[tuple[int, int, str], Departure] = {}
        self._wanted = asyncio.Event()
        self._looked = asyncio.Condition()
        self._looks = 0
        self._looking = False
        self.breaker = logged("the catalog", CATALOG)
        self.moving = Moving()

    @property
    def topology(self) -> Topology:
        """The snapshot to route by."""
        return self._topology

    def told(self, departures: Collection[Departure]) -> bool:
        """A shard has said where slots of its own went; whether that is news to the catalog's snapshot."""
        news = {}
        for gone in departures:
            key = (gone.first, gone.last, gone.source)
            known = self._told[key].epoch if key in self._told else self._catalogs.epoch
            if gone.epoch > known:
                news[key] = gone
        if not news:
            return False
        self._told.update(news)
        self._show()
        _log.info("slots have gone elsewhere, as their shard says", epoch=self._topology.epoch, ranges=len(news))
        # The catalog knows more of it, should it be there.
        self._wanted.set()
        return True

    async def newer(self, epoch: int, timeout_s: float) -> None:
        """Returns once the topology is newer than `epoch`, or the time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._looked:
                await self._looked.wait_for(lambda: self._topology.epoch > epoch)

    async def refresh(self, epoch: int, deadline: Deadline) -> None:
        """Returns once the topology has reached `epoch`, or the catalog has been looked at, or two seconds are over.

        At once while the catalog's breaker is open.
        """
        if 0 < epoch <= self._topology.epoch:
            return
        if self.breaker.refused_for_s():
            return  # Nobody is to wait for a catalog that is known to be away.
        # A look that is under way may have read the epoch before it was raised: it does not count.
        enough = self._looks + (2 if self._looking else 1)
        self._wanted.set()
        limit = min(deadline.at, Deadline.after(_REFRESH_TIMEOUT_S).at)
        try:
            async with asyncio.timeout_at(limit), self._looked:
                await self._looked.wait_for(lambda: self._looks >= enough or 0 < epoch <= self._topology.epoch)
        except TimeoutError:
            _log.warning("no newer topology in time", epoch=self._topology.epoch, wanted=epoch)

    async def run(self) -> None:
        """Follows the catalog until cancelled, reconnecting with backoff."""
        backoff_s, longest_s = _BACKOFF_S
        while True:
            looks = self._looks
            try:
                permit = self.breaker.admit()
            except Unavailable as refused:
                # uvloop wakes up to a millisecond early, which would be once more for nothing.
                await asyncio.sleep((refused.retry_after_s or 0.0) + 0.001)
                continue
            began = time.monotonic()
            try:
                async with AsyncExitStack() as stack:
                    # LISTEN has no limit of its own.
                    async with asyncio.timeout(_BEGIN_TIMEOUT_S):
                        connection = await self._listen(stack)
                        await self._look(connection)
                    permit.success(time.monotonic() - began)
                    await self._follow(connection)
            except _EXPECTED as error:
                permit.failure()
                _log.warning(
                    "the catalog is out of reach; serving from the snapshot",
                    epoch=self._topology.epoch,
                    error=type(error).__name__,
                )
            except Exception as bug:
                # Serving from the snapshot matters more than being told here and now: a router that left while the
                # catalog is away could not start again.
                _log.error("following the catalog failed by a bug", **logs.describe_bug(bug))
            finally:
                permit.ignore()
            if self._looks > looks:
                backoff_s = _BACKOFF_S[0]
            await self._announce_look()
            # Whatever wishes for a look gets it after the shortest pause: a catalog that is away is not hammered.
            self._wanted.clear()
            await asyncio.sleep(_BACKOFF_S[0])
            await self._wait(backoff_s - _BACKOFF_S[0])
            backoff_s = min(backoff_s * 2, longest_s)

    async def _listen(self, stack: AsyncExitStack) -> Connection:
        """A connection that hears the catalog's notifications, until the end of `stack`."""
        connection = await postgres.connect(self._dsn, what="the catalog")
        # Without the round trip of a polite close, which would wait for a server that may be gone.
        stack.callback(connection.terminate)
        await connection.add_listener(catalog.CHANNEL, self._notified)
        connection.add_termination_listener(self._notified)
        stack.callback(connection.remove_termination_listener, self._notified)
        return connection

    async def _follow(self, connection: Connection) -> None:
        while True:
            await self._wait(self._poll_s)
            await self._look(connection)

    async def _look(self, connection: Connection) -> None:
        async with asyncio.timeout(_REFRESH_TIMEOUT_S):
            # Cleared before the look: a wish that arrives during it leads to another look.
            self._wanted.clear()
            self._looking = True
            if await catalog.read_epoch(connection) != self._catalogs.epoch:
                await self._take(connection)
        await self._announce_look()
        # Nobody waits for this.
        await self.moving.look(connection)

    async def _take(self, connection: Connection) -> None:
        topology = await catalog.read_topology(connection)
        if topology.cluster_id != self._catalogs.cluster_id:
            raise catalog.CatalogError("the catalog now belongs to another cluster")
        if topology.epoch < self._catalogs.epoch:
            raise catalog.CatalogError("the catalog has gone back to an older epoch")
        self._catalogs = topology
        self._told = {key: gone for key, gone in self._told.items() if gone.epoch > topology.epoch}
        self._show()
        _log.info("topology changed", epoch=topology.epoch, shards=len(topology.shards))

    def _show(self) -> None:
        self._topology = self._catalogs.after(self._told.values()) if self._told else self._catalogs
        self._changed(self._topology)

    async def _announce_look(self) -> None:
        self._looking = False
        async with self._looked:
            self._looks += 1
            self._looked.notify_all()

    async def _wait(self, seconds: float) -> None:
        """Until something wants a look, or `seconds` have passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wanted.wait()

    def _notified(self, *_: object) -> None:
        self._wanted.set()
