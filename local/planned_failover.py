"""A failover on request: the primary ends in order, so that its standby has all of it, and comes back as a standby."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from common.sync_set import SyncSet, promotable
from local import replication
from local.appointment import RefusedError, UncertainError
from local.controldata import is_shut_down, last_checkpoint
from local.errors import LocalClusterError
from local.postgres import Server, run_program
from local.replication import StandbyView
from local.shard_servers import Process, ShardServers

# A standby that is further behind would keep the writes waiting while it catches up.
MAX_LAG_BYTES = 16 * 1024**2

_CHECKPOINT_TIMEOUT_S = 120.0
# The sync set may be at the point of being changed, as after an earlier failover.
_SETTLE_TIMEOUT_S = 10.0
_REACH_TIMEOUT_S = 5.0
# The order to promote has a bound of its own; this is for what the supervisor does when it failed.
_PROMOTED_TIMEOUT_S = 30.0
_REJOIN_TIMEOUT_S = 30.0
_CONTROLDATA_TIMEOUT_S = 10.0
_POLL_S = 0.1


class Step(Enum):
    """What has been done."""

    CHECKED = auto()
    STOPPED = auto()
    RECORDED = auto()
    PROMOTED = auto()
    REJOINED = auto()


@dataclass(frozen=True, slots=True)
class Progress:
    """A step that is done. `old` and `new` are servers' names."""

    step: Step
    message: str
    old: str
    new: str


class PlannedFailover:
    """Hands the writes of one shard over to one of its standbys."""

    def __init__(self, shard: ShardServers, tell: Callable[[Progress], None]) -> None:
        self._shard = shard
        self._tell = tell

    async def run(self, wanted: str | None = None) -> None:
        """To the server `wanted`, or the standby that is closest. Raises LocalClusterError; the old primary is the
        primary then, unless the error says otherwise.
        """
        shard = self._shard
        if wanted is not None and wanted not in shard.servers:
            raise RefusedError(f"{shard.shard_id} has no server {wanted}, only {', '.join(shard.servers)}")
        async with shard.lock:
            await shard.make_certain()
            old = shard.servers[shard.primary]
            if wanted == old.name:
                raise RefusedError(f"{old.name} is the primary of {shard.shard_id} already")
            new = await self._candidate(old, wanted)
            answering = await self._require_enough(old, new)
            await replication.checkpoint(old, shard.secrets, within_s=_CHECKPOINT_TIMEOUT_S)
            self._done(Step.CHECKED, f"{new.name} may take over from {old.name}", old, new)
            process = shard.ties.process(old.name)
            if process is None:
                raise RefusedError(f"{old.name} is not looked after by this supervisor")
            await self._hand_over(old, new, answering, process)
        # Without the lock: what puts right a promotion that failed needs it.
        await self._promoted(old, new)
        await self._rejoined(old, new)

    async def _candidate(self, old: Server, wanted: str | None) -> Server:
        """The standby to promote: one of the sync set, that streams, and is close. Raises RefusedError."""
        shard = self._shard
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while True:
            sync_set = await shard.appointer.read()
            lag_bytes = (await replication.look_at_primary(old, shard.secrets)).lag_bytes
            sure = sync_set.members & (sync_set.members if sync_set.following is None else sync_set.following)
            close = {name for name in sure if lag_bytes.get(name, MAX_LAG_BYTES) < MAX_LAG_BYTES}
            if wanted in close or (wanted is None and close):
                return shard.servers[wanted or min(sorted(close), key=lambda name: lag_bytes[name])]
            if time.monotonic() >= deadline:
                raise RefusedError(_why_not(wanted, sync_set, lag_bytes))
            await asyncio.sleep(_POLL_S)

    async def _require_enough(self, old: Server, new: Server) -> list[Server]:
        """The standbys that answer, once it is sure that they are enough to appoint `new`. Raises RefusedError.

        A frozen one seems to stream for a while; found out later, it would have cost the writes that time.
        """
        shard = self._shard
        standbys = [server for server in shard.servers.values() if server is not old]
        views = await asyncio.gather(*map(self._look_at, standbys))
        progress = {server.name: view.progress for server, view in zip(standbys, views, strict=True) if view}
        silent = [server.name for server in standbys if server.name not in progress]
        if new.name in silent or promotable(await shard.appointer.read(), progress) is None:
            raise RefusedError(f"{', '.join(silent) or 'a member'} {'does' if len(silent) < 2 else 'do'} not answer")
        # The old primary's end would wait for them.
        await replication.disconnect(old, shard.secrets, silent)
        return [server for server in standbys if server.name in progress]

    async def _look_at(self, standby: Server) -> StandbyView | None:
        try:
            return await replication.look_at_standby(standby, self._shard.secrets)
        except LocalClusterError as error:
            self._shard.log.debug("%s does not answer: %s", standby.name, error)
            return None

    async def _hand_over(self, old: Server, new: Server, answering: Sequence[Server], process: Process) -> None:
        """From the end of the old primary to the order that promotes the new one. Whatever happens, the old one is
        started again: as what the catalog says that it is.
        """
        shard = self._shard
        try:
            await process.hold()
            await self._require_all(old, new)
            self._done(Step.STOPPED, f"{old.name} has ended, and {new.name} has all of it", old, new)
            reached = await replication.reached(answering, shard.secrets, within_s=_REACH_TIMEOUT_S)
            await shard.appointer.appoint(reached, old=old.name, wanted=new.name)
            self._done(Step.RECORDED, f"the catalog names {new.name}", old, new)
            await shard.reign(new.name)
            # It ended in order and the other has all of it: it can follow as it is.
            shard.maker.write_settings(old, new)
        except UncertainError as error:
            shard.doubt()
            raise UncertainError(
                f"{error}. Whoever the catalog names becomes the primary of {shard.shard_id}"
            ) from error
        except LocalClusterError as error:
            raise RefusedError(f"{error}. {old.name} is started again as the primary") from error
        finally:
            process.release()

    async def _require_all(self, old: Server, new: Server) -> None:
        """Raises RefusedError unless the old primary ended in order, and the new one has its last words."""
        shard = self._shard
        program = shard.maker.binaries / "pg_controldata"
        text = await run_program(
            [str(program), str(old.pgdata)], Path(old.pgdata), shard.maker.account, timeout_s=_CONTROLDATA_TIMEOUT_S
        )
        if not is_shut_down(text):
            raise RefusedError(f"{old.name} did not end in order")
        reached = await replication.reached([new], shard.secrets, within_s=_REACH_TIMEOUT_S)
        if new.name not in reached or reached[new.name].lsn <= last_checkpoint(text):
            raise RefusedError(f"{new.name} has not got all that {old.name} wrote")

    async def _promoted(self, old: Server, new: Server) -> None:
        shard = self._shard
        try:
            async with asyncio.timeout(_PROMOTED_TIMEOUT_S):
                await shard.until_writable()
        except TimeoutError as error:
            raise LocalClusterError(
                f"{new.name} is recorded as the primary of {shard.shard_id}, and is not promoted yet after "
                f"{_PROMOTED_TIMEOUT_S:.0f} s; the supervisor goes on trying"
            ) from error
        if shard.primary != new.name:
            raise LocalClusterError(f"{new.name} has died, and {shard.primary} has taken over from it")
        self._done(Step.PROMOTED, f"{new.name} takes the writes of {shard.shard_id}", old, new)

    async def _rejoined(self, old: Server, new: Server) -> None:
        try:
            async with asyncio.timeout(_REJOIN_TIMEOUT_S):
                while not await self._follows(old, new):  # noqa: ASYNC110  # Nothing tells us; we have to ask.
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise LocalClusterError(
                f"{new.name} is the primary, but {old.name} does not follow it after {_REJOIN_TIMEOUT_S:.0f} s; "
                "the supervisor goes on trying"
            ) from error
        self._done(Step.REJOINED, f"{old.name} follows {new.name}", old, new)

    async def _follows(self, old: Server, new: Server) -> bool:
        return old.name in (await replication.look_at_primary(new, self._shard.secrets)).lag_bytes

    def _done(self, step: Step, message: str, old: Server, new: Server) -> None:
        self._shard.log.info("failover of %s: %s", self._shard.shard_id, message)
        self._tell(Progress(step, message, old.name, new.name))


def _why_not(wanted: str | None, sync_set: SyncSet, lag_bytes: Mapping[str, int]) -> str:
    members, streaming = (", ".join(sorted(names)) or "none" for names in (sync_set.members, lag_bytes))
    who = f"{wanted} is not" if wanted else "no standby is"
    return f"{who} sure to have all that is acknowledged. Commits wait for {members}; {streaming} stream"
