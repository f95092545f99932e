"""Looking after the servers of one shard all the time: the primary is one, the others follow it or are made anew."""

import asyncio

from local import replication
from local.errors import LocalClusterError
from local.postgres import Server
from local.replication import PrimaryView, StandbyView
from local.shard_servers import ShardServers
from local.standby_settings import follows, slot_name
from local.succession import StuckWatch

_INTERVAL_S = 1.0


class ShardWatch:
    """What is found wrong is put right at the next look at the latest: a failover leaves most of its work to this."""

    def __init__(self, shard: ShardServers) -> None:
        self._shard = shard
        self._stuck = StuckWatch()

    async def run(self) -> None:
        """Never returns."""
        shard = self._shard
        while True:
            shard.wake.clear()
            restart = [*await self._look(), *shard.moved_replicas()]
            await asyncio.gather(*(self._restart(name) for name in restart))
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await shard.wake.wait()
            except TimeoutError:
                continue

    async def _look(self) -> list[str]:
        """Puts right what can be at once; the names of the standbys that have to be made anew.

        Most of it without the lock, for a failover cannot wait until a frozen server does not answer.
        """
        shard = self._shard
        try:
            async with shard.lock:
                await shard.make_certain()
                primary = shard.servers[shard.primary]
            view = await replication.look_at_primary(primary, shard.secrets)
            if view.in_recovery:
                async with shard.lock:
                    if primary.name == shard.primary:
                        shard.log.warning("%s is to be the primary of %s", primary.name, shard.shard_id)
                        await shard.reign(primary.name)
                return []
            await self._keep_slots(primary, view)
        except LocalClusterError as error:
            shard.log.debug("%s cannot be looked after: %s", shard.shard_id, error)
            return []
        standbys = shard.standbys()
        why_unfit = await asyncio.gather(*(self._look_at(standby, primary, view) for standby in standbys))
        async with shard.lock:
            if primary.name != shard.primary:
                return []  # It was the view of another time.
            unfit = [standby.name for standby, why in zip(standbys, why_unfit, strict=True) if why]
            shard.damaged.update(unfit)
        return unfit

    async def _keep_slots(self, primary: Server, view: PrimaryView) -> None:
        """A slot for each standby, and none for others of this shard: it would keep the log until the disk is full."""
        shard = self._shard
        ours = {slot_name(name) for name in shard.servers}
        wanted = {slot_name(standby.name) for standby in shard.standbys()}
        present = {slot.name for slot in view.slots}
        unused = {slot.name for slot in view.slots if not slot.active} & ours - wanted
        if unused:
            await replication.drop_slots(primary, shard.secrets, unused)
        if wanted - present:
            await replication.create_slots(primary, shard.secrets, wanted)

    async def _look_at(self, standby: Server, primary: Server, view: PrimaryView) -> str:
        """Why a standby has to be made anew; empty when it has not."""
        shard = self._shard
        try:
            seen = await replication.look_at_standby(standby, shard.secrets)
            await self._correct(standby, primary, seen)
        except LocalClusterError:  # It does not run, or is frozen, or at work on becoming ready.
            self._stuck.forget(standby.name)
            return ""
        why = self._why_unfit(standby, view, seen)
        if why:
            shard.log.warning("%s has to be made anew: it %s", standby.name, why)
            self._stuck.forget(standby.name)
        return why

    def _why_unfit(self, standby: Server, view: PrimaryView, seen: StandbyView) -> str:
        lost = any(slot.lost and slot.name == slot_name(standby.name) for slot in view.slots)
        if not seen.in_recovery:
            return "takes writes, and is not the primary"
        if lost:
            return "was away for so long that the log that it needs is gone"
        if self._stuck.is_stuck(standby.name, seen.progress, streams=standby.name in view.lag_bytes):
            return "cannot follow the primary"
        return ""

    async def _correct(self, standby: Server, primary: Server, seen: StandbyView) -> None:
        shard = self._shard
        if seen.in_recovery and not follows(seen.conninfo, primary):
            await replication.follow(standby, primary, shard.secrets)
            shard.log.info("%s follows %s", standby.name, primary.name)
        # From when it was the primary.
        unused = {slot.name for slot in seen.slots if not slot.active} & {slot_name(name) for name in shard.servers}
        unused |= set(seen.strays)
        if unused:
            await replication.drop_slots(standby, shard.secrets, unused)

    async def _restart(self, name: str) -> None:
        process = self._shard.ties.process(name)
        if process is not None:
            await process.restart()
