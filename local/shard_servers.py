"""The PostgreSQL servers of one shard: which of them takes the writes, and what is done about it when one dies."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from local import leftovers, replication, standby
from local.appointment import Appointer, UncertainError
from local.errors import DataDirectoryError, LocalClusterError
from local.postgres import Server
from local.standby import Maker
from local.standby_settings import slot_name
from local.state import Role

# How long the members of a sync set get to say how far they are.
_REACH_TIMEOUT_S = 3.0
# Starts in a row without health after which a standby's directory is taken to be damaged.
_MAX_BAD_STARTS = 3
_POLL_S = 0.1
# Between two looks whether somebody can take the place of a primary whose directory is lost.
_LOST_INTERVAL_S = 0.5
_LOOK_TIMEOUT_S = 1.0


class Process(Protocol):
    """What this does with the processes of its servers, and of the services on them."""

    async def hold(self) -> None:
        """Ends it and keeps it down."""

    def release(self) -> None:
        """Lets it start again."""

    async def restart(self) -> None:
        """Ends it and starts it again."""


@dataclass(slots=True)
class Ties:
    """What binds the servers to the supervisor; set when there is one."""

    process: Callable[[str], Process | None] = lambda _name: None
    """A process by its name."""
    changed: Callable[[], None] = lambda: None
    """To be told when a server has become the primary."""


class ShardServers:
    """The servers of one shard, by name, and what the catalog says of them."""

    def __init__(
        self, appointer: Appointer, replicas: Sequence[str], maker: Maker, log: logging.Logger, *, new: bool
    ) -> None:
        """`new`: the cluster is being made, so that the first server is the primary whatever the catalog says."""
        self.shard_id = appointer.shard_id
        self.servers = appointer.servers
        self.primary = next(iter(appointer.servers))
        """Name of the server that the catalog has as the primary, as far as is known."""
        self.ties = Ties()
        self.lock = asyncio.Lock()
        """Held while it is decided who the primary is, and while that is acted upon."""
        self.wake = asyncio.Event()
        """Set when there is something to look after at once."""
        self.appointer = appointer
        self.maker = maker
        self.secrets = appointer.secrets
        self.log = log
        self.damaged: set[str] = set()
        """Standbys that have to be made anew before they are started again."""
        self._replicas = tuple(replicas)
        self._replica_on: dict[str, str] = {}
        self.making: set[str] = set()
        """Standbys that are being made at this moment."""
        self.lost: set[str] = set()
        """A primary whose directory is missing, while it waits for a standby to take its place."""
        self._certain = new
        self._bad_starts: dict[str, int] = dict.fromkeys(self.servers, 0)

    def role(self, name: str) -> Role:
        """A server's role now."""
        return "postgres-primary" if name == self.primary else "postgres-standby"

    def standbys(self) -> list[Server]:
        """The servers that follow the primary."""
        return [server for name, server in self.servers.items() if name != self.primary]

    def server_of_replica(self, name: str) -> Server:
        """The standby that a replica service is on: the one with its number, the first server when that is the primary.
        So a failover moves one service only.
        """
        servers = list(self.servers)
        numbered = servers[self._replicas.index(name) + 1]
        return self.servers[numbered if numbered != self.primary else servers[0]]

    async def place_replica(self, name: str) -> Server:
        """Returns the standby that a replica service is on, once that answers."""
        while True:
            server = self.server_of_replica(name)
            try:
                if (await replication.look_at_standby(server, self.secrets)).in_recovery:
                    self._replica_on[name] = server.name
                    return server
            except LocalClusterError as error:
                self.log.debug("%s waits for %s: %s", name, server.name, error)
            await asyncio.sleep(_POLL_S)

    def moved_replicas(self) -> list[str]:
        """The replica services that were started on a server that is not theirs any more."""
        return [name for name, server in self._replica_on.items() if self.server_of_replica(name).name != server]

    # What happens to one server's process.

    async def prepare(self, name: str) -> None:
        """Before each start of a server's process: its directory is made what its role needs.

        A primary whose directory is lost waits for standbys that may take its place. Raises LocalClusterError.
        """
        server = self.servers[name]
        while True:
            async with self.lock:
                await self.make_certain()
                if name == self.primary and standby.exists(server.pgdata):
                    self._prepare_primary(server)
                    return
                if name == self.primary:
                    await self._fail_over(name, again=name in self.lost)
                self.lost.discard(name)
                if name != self.primary:
                    break
                await self._require_hope(server)
                self.lost.add(name)
            await asyncio.sleep(_LOST_INTERVAL_S)
        await self._prepare_standby(server)

    def healthy(self, name: str) -> None:
        """A server's process answers."""
        self._bad_starts[name] = 0

    async def died(self, name: str) -> None:
        """A server's process has ended by itself. When it was the primary, another takes its place if one may."""
        async with self.lock:
            if name == self.primary and len(self.servers) > 1:
                await self._fail_over(name)

    async def make_certain(self) -> None:
        """Asks the catalog who the primary is, unless that is known. Raises LocalClusterError."""
        if not self._certain:
            self.primary = (await self.appointer.read()).primary
            self._certain = True
            self.ties.changed()

    def assume(self, name: str) -> None:
        """Takes a server for the primary without asking the catalog: there is none."""
        self.primary = name
        self._certain = True

    def doubt(self) -> None:
        """Who the primary is has to be asked before any server is started as one."""
        self._certain = False

    async def _require_hope(self, lost: Server) -> None:
        """Raises DataDirectoryError unless a member of the sync set may yet take the place of a primary that is lost:
        one that has its data, and is not ready to be asked.
        """
        sync_set = await self.appointer.read()
        members = sorted((sync_set.members | (sync_set.following or frozenset())) & self.servers.keys())
        awaited = [
            name
            for name in members
            if standby.is_standby(self.servers[name].pgdata) and self._bad_starts[name] < _MAX_BAD_STARTS
        ]
        if not awaited or not await self._unready(awaited):
            who = f"of {', '.join(members)} too few have" if members else "no standby is sure to have"
            raise DataDirectoryError(
                f"{lost.pgdata} is missing, and with it the data of {lost.name}; {who} all that was acknowledged. "
                "Restore it, or make a new cluster with another --data-dir"
            )

    async def _unready(self, names: Sequence[str]) -> bool:
        """Whether one of these is still on its way: it starts, or has not come to the end of its log."""
        servers = [self.servers[name] for name in names]
        reached = await replication.reached(servers, self.secrets, within_s=_LOOK_TIMEOUT_S)
        return reached.keys() != set(names)

    def _prepare_primary(self, server: Server) -> None:
        if standby.is_standby(server.pgdata):
            # It was appointed, and not promoted yet. Without standby.signal it would go on in the old timeline.
            self.maker.write_settings(server, None)

    async def _prepare_standby(self, server: Server) -> None:
        unfit = (
            not standby.is_standby(server.pgdata)
            or server.name in self.damaged
            or self._bad_starts[server.name] >= _MAX_BAD_STARTS
        )
        if unfit:
            await self.until_writable()
            primary = self.servers[self.primary]
            began = time.monotonic()
            self.making.add(server.name)
            try:
                await self.maker.remake(server, primary)
            finally:
                self.making.discard(server.name)
            self.log.info("%s made from %s in %.1f s", server.name, primary.name, time.monotonic() - began)
            self.damaged.discard(server.name)
            self._bad_starts[server.name] = 0
        self._bad_starts[server.name] += 1
        if server.name != self.primary:
            self.maker.write_settings(server, self.servers[self.primary])

    async def until_writable(self) -> None:
        """Returns when the shard has a server that takes writes."""
        while True:
            try:
                if not (await replication.look_at_primary(self.servers[self.primary], self.secrets)).in_recovery:
                    return
            except LocalClusterError as error:
                self.log.debug("%s has no primary yet: %s", self.shard_id, error)
            await asyncio.sleep(_POLL_S)

    async def _fail_over(self, dead: str, *, again: bool = False) -> None:
        """Promotes a member of the sync set in place of a primary whose postmaster is dead. Failing that, nothing: it
        is started again where it was, and its own recovery brings back what it acknowledged. `again`: no news.
        """
        began = time.monotonic()
        try:
            # A backend without its postmaster still acknowledges what it was doing.
            await leftovers.kill(self.servers[dead].pgdata)
            standbys = [server for name, server in self.servers.items() if name != dead]
            reached = await replication.reached(standbys, self.secrets, within_s=_REACH_TIMEOUT_S)
            chosen = await self.appointer.appoint(reached, old=dead)
        except UncertainError as error:
            self.doubt()
            self.log.error("failover of %s: %s", self.shard_id, error)  # noqa: TRY400  # It is written for people.
            return
        except LocalClusterError as error:
            self.log.log(logging.DEBUG if again else logging.WARNING, "no failover of %s: %s", self.shard_id, error)
            return
        if await self.reign(chosen.primary):
            self.log.warning(
                "%s is the primary of %s in place of %s after %.2f s",
                *(chosen.primary, self.shard_id, dead, time.monotonic() - began),
            )

    async def reign(self, name: str) -> bool:
        """Makes a server that was appointed the primary in fact; whether it is. shard_watch.py does the rest, and what
        fails here.
        """
        self.primary = name
        self.ties.changed()
        server, slots = self.servers[name], [slot_name(standby.name) for standby in self.standbys()]
        try:
            # Before it can be written to: by its slot an erasure knows that a standby is away, and has not replayed it.
            await replication.create_slots(server, self.secrets, slots)
        except LocalClusterError as error:
            self.log.warning("%s: its standbys' slots come later: %s", name, error)
        try:
            await replication.promote(server, self.secrets)
        except LocalClusterError as error:
            # It is written for people.
            self.log.error("%s is to be the primary of %s, and is not yet: %s", name, self.shard_id, error)  # noqa: TRY400
            return False
        self.wake.set()
        return True
