"""Recording in the catalog who is to take a shard's writes: the moment at which one server's reign ends.

Before it the old primary may be started again, after it never: only the one that the catalog names may be promoted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common import catalog
from common.catalog import EpochConflictError, SyncSetConflictError
from common.sync_set import Progress, SyncSet
from local import replication
from local.errors import LocalClusterError
from local.postgres import Server
from local.record import Secrets
from local.sessions import as_owner
from local.succession import Succession, succession

CATALOG_TIMEOUT_S = 3.0

_TRIES = 5


class RefusedError(LocalClusterError):
    """Nobody was appointed, and nothing has changed."""


class UncertainError(LocalClusterError):
    """Whether somebody was appointed is not known: the catalog was lost at that moment. It has to be asked."""


@dataclass(frozen=True, slots=True)
class Appointer:
    """Reads and changes the catalog's record of one shard."""

    shard_id: str
    catalog: Server
    servers: Mapping[str, Server]
    secrets: Secrets

    async def read(self) -> SyncSet:
        """The shard's primary and sync set. Raises LocalClusterError."""
        async with as_owner(self.catalog, self.secrets, CATALOG_TIMEOUT_S) as connection:
            sync_set = await catalog.read_sync_set(connection, self.shard_id)
        if sync_set is None:
            raise LocalClusterError(f"the catalog knows no primary of {self.shard_id}")
        return sync_set

    async def appoint(self, reached: Mapping[str, Progress], *, old: str, wanted: str | None = None) -> Succession:
        """Records a successor of `old`, who takes no writes any more, among those who were reached.

        Before, the successor is told whose confirmation its commits are to wait for. Raises RefusedError,
        UncertainError, LocalClusterError (nothing has changed then either).
        """
        for _ in range(_TRIES):
            sync_set = await self.read()
            if sync_set.primary != old:
                raise UncertainError(f"{sync_set.primary} is the primary of {self.shard_id} by now, not {old}")
            chosen = succession(sync_set, {n: p for n, p in reached.items() if n != old}, wanted)
            if chosen is None:
                raise RefusedError(_why_nobody(sync_set, reached, wanted))
            await replication.wait_for(self.servers[chosen.primary], self.secrets, chosen.members)
            if await self._change(sync_set, chosen):
                return chosen
        raise RefusedError(f"the catalog keeps changing; {old} stays the primary of {self.shard_id}")

    async def _change(self, planned: SyncSet, chosen: Succession) -> bool:
        """Whether it was recorded; False: something has changed since, and nothing was recorded."""
        asked = False
        try:
            async with as_owner(self.catalog, self.secrets, CATALOG_TIMEOUT_S) as connection:
                epoch = await catalog.read_epoch(connection)
                asked = True
                try:
                    await catalog.change_primary(
                        connection, epoch, self.shard_id, planned, primary=chosen.primary, members=chosen.members
                    )
                except (EpochConflictError, SyncSetConflictError):
                    return False
        except LocalClusterError as error:
            if asked:
                raise UncertainError(str(error)) from error
            raise
        return True


def _why_nobody(sync_set: SyncSet, reached: Mapping[str, Progress], wanted: str | None) -> str:
    if not sync_set.members:
        return "no standby is sure to have all that was acknowledged"
    names = ", ".join(sorted(sync_set.members | (sync_set.following or frozenset())))
    if wanted is not None:
        return f"{wanted} is not sure to have all that was acknowledged; commits wait for {names}"
    return f"too few of {names} answer ({', '.join(sorted(reached)) or 'none'})"
