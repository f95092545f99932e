"""Keeping the sync set: the standbys that commits wait for, in the catalog's record and in the primary's setting.

Every change goes through the catalog first, by compare-and-set, so that a failover knows of it: `following` is
recorded, the setting changed, and when that is in force `following` becomes the set (common/sync_set.py). With the
catalog out of reach nothing changes, and commits wait for those they waited for.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from common import catalog, logs
from common.catalog import SyncSetConflictError
from common.config import ShardSettings
from common.postgres import CONNECT_ERRORS, Connection
from common.sync_set import SyncSet, setting
from shard.durability import Durability
from shard.primary import Primary
from shard.sync_plan import Seen, Settling, Standby, View, Watch, target

if TYPE_CHECKING:
    from shard.primary import PrimaryConnection

_log = logs.get_logger("sync keeper")

_INTERVAL_S = 0.2
# Between looks at the catalog while nothing changes: how long a failover that somebody else decided goes unnoticed.
_CATALOG_INTERVAL_S = 1.0
# Between looks for a sync set where the catalog keeps none for this shard.
_IDLE_INTERVAL_S = 2.0
_TIMEOUT_S = 2.0
_PAUSE_S = 0.2
# Longer than a server that hangs takes to be given up: the others are chosen from after that.
_FIND_TIMEOUT_S = 5.0

_LOOK = """
SELECT current_setting('cluster_name') AS server, current_setting('synchronous_standby_names') AS setting,
       (pg_current_wal_flush_lsn() - '0/0')::bigint AS lsn
"""
# Without backups that are under way, subscribers, and receivers that keep the log and no data.
_LOOK_AT_STANDBYS = """
SELECT application_name AS name, state = 'streaming' AS streaming, (flush_lsn - '0/0')::bigint AS flushed,
       sync_priority > 0 AS counted
FROM pg_stat_replication LEFT JOIN pg_replication_slots ON active_pid = pid
WHERE replay_lsn IS NOT NULL AND flush_lsn IS NOT NULL AND coalesce(slot_type = 'physical' AND NOT temporary, true)
ORDER BY flush_lsn
"""
# The statement takes no parameters: the server makes it from one, quoted.
_MAKE_SETTING = "SELECT format('ALTER SYSTEM SET synchronous_standby_names = %L', $1::text)"
_RELOAD = "SELECT pg_reload_conf()"


class SyncKeeper:
    """Keeps one shard's sync set, on the primary and in the catalog, and tells `durability` how far it has got."""

    def __init__(self, settings: ShardSettings, owner: Primary, durability: Durability) -> None:
        self._shard_id = settings.shard_id
        self._catalog_dsn = settings.catalog_dsn.get_secret_value()
        self._may_degrade = settings.on_standby_loss == "degrade"
        self._loss_s = settings.standby_loss_s
        self._owner = owner
        self._durability = durability
        self._catalog: asyncpg.Connection[asyncpg.Record] | None = None
        self._recorded: SyncSet | None = None
        self._read_at = float("-inf")
        self._settling: Settling | None = None
        # The connection to the primary is for one statement at a time.
        self._busy = asyncio.Lock()
        self._trouble = ""

    async def run(self) -> None:
        """Keeps it until cancelled; whatever goes away meanwhile is looked for again."""
        try:
            while True:
                try:
                    async with self._server() as server:
                        await self._keep(server)
                except CONNECT_ERRORS as error:
                    self._tell_trouble("the primary", error)
                await asyncio.sleep(_PAUSE_S)
        finally:
            self._leave_catalog()

    @asynccontextmanager
    async def _server(self) -> "AsyncIterator[PrimaryConnection]":
        """A connection to the primary. Nothing is certain before one is had, and once it is lost."""
        await self._owner.find(_FIND_TIMEOUT_S)
        async with asyncio.timeout(_TIMEOUT_S):
            connection = await self._owner.connect()
        try:
            yield connection
        finally:
            self._durability.set_local()
            connection.terminate()

    async def _keep(self, server: "PrimaryConnection") -> None:
        """Looks and acts, as long as this is the primary.

        Looks go on whatever the catalog is asked meanwhile, and however long it takes: that this server is gone, or its
        setting another, has to be noticed at once.
        """
        watch = Watch(self._loss_s, self._loss_s / 2)
        self._recorded, self._settling, self._read_at = None, None, float("-inf")
        step: asyncio.Task[None] | None = None
        try:
            while server.timeline >= self._owner.timeline:
                view, seen, now = await self._look(server, watch)
                if step is None or step.done():
                    if step is not None:
                        step.result()
                    step = asyncio.create_task(self._step(server, view, seen, now))
                await asyncio.sleep(_INTERVAL_S)
        finally:
            self._durability.set_local()
            if step is not None:
                await self._abandon(step)

    async def _look(self, server: Connection, watch: Watch) -> tuple[View, Seen, float]:
        """The primary as it is, what that says of the standbys, and when (the loop's clock)."""
        async with asyncio.timeout(_TIMEOUT_S), self._busy:
            view = await _view(server)
            now, known = asyncio.get_running_loop().time(), self._recorded
        if known is not None and not _is_recorded(view.setting, known):
            # Somebody else has changed it. Should it be put right, it is in force no sooner than a new one.
            self._durability.set_local()
            self._settling = Settling(known.members if known.following is None else known.following, now)
        return view, watch.look(_names(known), view, now), now

    async def _step(self, server: "PrimaryConnection", view: View, seen: Seen, now: float) -> None:
        """What is to be done after a look, if the catalog lets."""
        # Without news from the catalog nothing changes: whoever was waited for is waited for.
        if not await self._read_catalog(now):
            return
        recorded = self._recorded
        if recorded is None:
            self._durability.set_local()
            self._durability.depose(0)
            await asyncio.sleep(_IDLE_INTERVAL_S)
        elif self._is_ours(server, recorded, view):
            await self._act(server, recorded, view, seen, now)

    async def _abandon(self, step: asyncio.Task[None]) -> None:
        """Ends a step under way. What it had asked of the catalog may or may not have happened."""
        if not step.done():
            step.cancel()
            self._leave_catalog()
            await asyncio.wait([step])
        if not step.cancelled() and (error := step.exception()) is not None:
            self._tell_trouble("a step that was given up", error)

    def _is_ours(self, server: "PrimaryConnection", recorded: SyncSet, view: View) -> bool:
        """Whether the catalog's primary is the server at hand. If not, nothing is acted upon or promised."""
        if recorded.primary == view.server:
            self._durability.depose(0)
            return True
        self._durability.set_local()
        # A server without a name cannot be told from another.
        self._durability.depose(server.timeline if view.server else 0)
        self._settling = None
        self._tell_trouble(f"the primary is {view.server or 'without a cluster_name'}, and by the catalog another")
        return False

    async def _act(self, server: "PrimaryConnection", recorded: SyncSet, view: View, seen: Seen, now: float) -> None:
        """One step towards the set that should be in force, and what may be said of it meanwhile."""
        wanted = target(recorded, seen, may_degrade=self._may_degrade)
        if wanted != (recorded.members if recorded.following is None else recorded.following):
            changed = await self._change(recorded, members=recorded.members, following=wanted)
            if changed is None:
                return
            recorded = changed
        if not wanted:
            # Before the setting changes: from then on a commit may be on the primary alone.
            self._durability.set_local()
        if view.setting != setting(wanted):
            if not _is_recorded(view.setting, recorded):
                self._durability.set_local()
            async with asyncio.timeout(_TIMEOUT_S), self._busy:
                await server.execute(await server.fetchval(_MAKE_SETTING, setting(wanted)))
                await server.execute(_RELOAD)
            self._settling = Settling(wanted, now)
            return
        if self._settling is None or self._settling.members != wanted:
            self._settling = Settling(wanted, None if recorded.following is None else now)
        if recorded.following is None and self._durability.members == wanted:
            return
        settling = self._settling
        if not settling.is_in_force(view, now):
            return
        if recorded.following is not None and await self._change(recorded, members=wanted, following=None) is None:
            return
        if settling is not self._settling:
            # A look has seen something else meanwhile.
            return
        if wanted:
            self._durability.set_quorum(wanted, view.server, server.timeline)
        self._trouble = ""
        _log.info("sync set in force", members=sorted(wanted))

    async def _read_catalog(self, now: float) -> bool:
        """Whether what is known of the catalog is less than about a second old; reads it when it is not."""
        if self._catalog is not None and now - self._read_at < _CATALOG_INTERVAL_S:
            return True
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if self._catalog is None:
                    self._catalog = await asyncpg.connect(self._catalog_dsn)
                self._recorded = await catalog.read_sync_set(self._catalog, self._shard_id)
        except CONNECT_ERRORS as error:
            self._leave_catalog()
            self._tell_trouble("the catalog", error)
            return False
        self._read_at = now
        return True

    async def _change(
        self, recorded: SyncSet, *, members: frozenset[str], following: frozenset[str] | None
    ) -> SyncSet | None:
        """Changes the catalog, if it still has `recorded`; None when it has not, or did not answer."""
        assert self._catalog is not None
        self._read_at = float("-inf")
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                self._recorded = await catalog.change_sync_set(
                    self._catalog, self._shard_id, recorded, members=members, following=following
                )
        except SyncSetConflictError:
            return None
        except CONNECT_ERRORS as error:
            self._leave_catalog()
            self._tell_trouble("the catalog", error)
            return None
        _log.info(
            "sync set changed",
            members=sorted(members),
            following=None if following is None else sorted(following),
            version=self._recorded.version,
        )
        return self._recorded

    def _leave_catalog(self) -> None:
        if self._catalog is not None:
            self._catalog.terminate()
            self._catalog = None

    def _tell_trouble(self, what: str, error: BaseException | None = None) -> None:
        """Logs it once, however often it is met."""
        trouble = f"{what}: {type(error).__name__}" if error else what
        if trouble != self._trouble:
            _log.warning("the sync set stays as it is", why=trouble)
        self._trouble = trouble


def _names(known: SyncSet | None) -> frozenset[str]:
    """Whoever commits may be waiting for."""
    return known.members | (known.following or frozenset()) if known else frozenset()


def _is_recorded(names: str, recorded: SyncSet) -> bool:
    """Whether a setting is that of the set, or of the one that it is being changed to."""
    return names == setting(recorded.members) or (
        recorded.following is not None and names == setting(recorded.following)
    )


async def _view(server: Connection) -> View:
    row = await server.fetchrow(_LOOK)
    assert row is not None
    standbys = {
        found["name"]: Standby(found["streaming"], found["flushed"], found["counted"])
        for found in await server.fetch(_LOOK_AT_STANDBYS)
    }
    return View(row["server"], row["setting"], row["lsn"], standbys)
