"""Restarting processes one after the other while the cluster serves: the next only when all is as it was before."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from local import replication
from local.appointment import RefusedError
from local.errors import LocalClusterError
from local.process import Child
from local.shard_servers import ShardServers
from local.state import Role

# Standbys before primaries, so that there is one to follow; routers last, so that what they ask is new already.
_ORDER: tuple[Role, ...] = ("postgres-standby", "postgres-primary", "redis", "replica", "shard", "router")
_WELL_TIMEOUT_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Restarted:
    """A process that has been restarted, and is well again after `seconds`."""

    name: str
    role: Role
    seconds: float


class RollingRestart:
    """Restarts of the processes of one supervisor, no two at a time."""

    def __init__(
        self, processes: Callable[[], Sequence[Child]], shards: Mapping[str, ShardServers], log: logging.Logger
    ) -> None:
        self._processes = processes
        self._shards = shards
        self._log = log
        self._busy = asyncio.Lock()

    async def run(self, names: Sequence[str]) -> AsyncIterator[Restarted]:
        """Restarts these, in their order, or all in ours; each, as it is well again. Raises RefusedError,
        LocalClusterError."""
        known = {child.spec.name: child for child in self._processes()}
        if unknown := [name for name in names if name not in known]:
            raise RefusedError(f"there is no process {unknown[0]}, only {', '.join(known)}")
        if self._busy.locked():
            raise RefusedError("another restart is under way")
        async with self._busy:
            # A role may change under way, with a failover: what is left is ordered anew each time.
            left = [known[name] for name in names] or list(known.values())
            while left:
                child = left[0] if names else min(left, key=lambda one: _ORDER.index(one.state().role))
                left.remove(child)
                yield await self._restart(child)

    async def _restart(self, child: Child) -> Restarted:
        began = time.monotonic()
        before, role = child.state().pid, child.state().role
        if child.spec.handover_variable:
            try:
                await child.hand_over()
            except LocalClusterError as error:
                raise RefusedError(str(error)) from error
        else:
            await child.restart()
        try:
            async with asyncio.timeout(_WELL_TIMEOUT_S):
                while not await self._is_well(child, before):  # noqa: ASYNC110  # Nothing tells us; we have to ask.
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise LocalClusterError(
                f"{child.spec.name} is not well {_WELL_TIMEOUT_S:.0f} s after its restart; the others were left alone"
            ) from error
        restarted = Restarted(child.spec.name, role, time.monotonic() - began)
        self._log.info("%s restarted in %.1f s", restarted.name, restarted.seconds)
        return restarted

    async def _is_well(self, child: Child, before: int | None) -> bool:
        """Whether another process serves in its place and, of a shard's server, every standby streams."""
        pid = child.state().pid
        if pid is None or pid == before or not await child.spec.probe():
            return False
        shard = self._shards.get(child.spec.shard_id or "")
        return shard is None or child.spec.name not in shard.servers or await self._streams(shard)

    async def _streams(self, shard: ShardServers) -> bool:
        try:
            view = await replication.look_at_primary(shard.servers[shard.primary], shard.secrets)
        except LocalClusterError:
            return False
        return not view.in_recovery and {server.name for server in shard.standbys()} <= view.lag_bytes.keys()
