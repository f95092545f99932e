"""What the supervisor asks of a shard's servers about their replication, and tells them. All as the superuser."""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from common.postgres import Connection
from common.sync_set import Progress, setting
from local.errors import LocalClusterError
from local.postgres import Server
from local.record import Secrets
from local.sessions import as_superuser
from local.standby_settings import (
    PRIMARY_CONNINFO,
    PRIMARY_SLOT_NAME,
    SYNCHRONOUS_STANDBY_NAMES,
    conninfo,
    slot_name,
)

ASK_TIMEOUT_S = 2.0
# A promotion replays what is left of the log; it waits for no checkpoint.
PROMOTE_TIMEOUT_S = 30.0

_POLL_S = 0.05

_IN_RECOVERY = "SELECT pg_is_in_recovery()"
# A base backup has a receiver too, under a name of its own.
_FOLLOWERS = """
SELECT application_name, state, coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn), 0)::bigint AS lag_bytes
FROM pg_stat_replication WHERE state IN ('streaming', 'catchup')
"""
_SLOTS = """
SELECT slot_name, active, wal_status = 'lost' AS lost FROM pg_replication_slots
WHERE slot_type = 'physical' AND NOT temporary
"""
# The timeline of the log on disk is that of its newest file: the control file's lags behind, and the receiver is gone
# when its primary is.
_STANDBY = """
SELECT pg_is_in_recovery() AS in_recovery,
       coalesce(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn, 0)::bigint AS lsn,
       (SELECT max(left(name, 8)) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$') AS timeline,
       EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming') AS receives,
       pg_last_wal_receive_lsn() IS NOT NULL AS has_asked,
       EXISTS (
           SELECT FROM pg_stat_activity
           WHERE backend_type = 'startup' AND wait_event IN ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval')
       ) AS waits_for_log,
       current_setting('primary_conninfo') AS conninfo,
       ARRAY(
           SELECT slot_name::text FROM pg_replication_slots
           WHERE slot_type = 'logical' AND NOT active AND NOT synced
       ) AS strays
"""
_PROMOTE = "SELECT pg_promote(true, $1)"
_CREATE_SLOT = "SELECT pg_create_physical_replication_slot($1, true)"
_DROP_SLOT = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1"
_END_SLOTS_USER = """
SELECT pg_terminate_backend(active_pid, 2000) FROM pg_replication_slots WHERE slot_name = $1 AND active
"""
_END_SENDERS = """
SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_replication WHERE application_name = ANY ($1::text[])
"""
# ALTER SYSTEM takes no parameters, so the server makes the statement from some.
_ALTER_SYSTEM = "SELECT format('ALTER SYSTEM SET %I = %L', $1::text, $2::text)"
_RELOAD = "SELECT pg_reload_conf()"


@dataclass(frozen=True, slots=True)
class Slot:
    """A standby's replication slot. A lost one has no log left that the standby needs."""

    name: str
    active: bool
    lost: bool


@dataclass(frozen=True, slots=True)
class PrimaryView:
    """What a server says of those that follow it. `lag_bytes`, by name: what each has not yet on its disk."""

    in_recovery: bool
    lag_bytes: Mapping[str, int]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class StandbyView:
    """What a server says of itself."""

    in_recovery: bool
    progress: Progress
    receives: bool
    """Whether the log comes in at this moment."""
    has_asked: bool
    """Whether it has asked its primary for more log since it was started: its own was at an end then."""
    waits_for_log: bool
    """Whether it has nothing to replay at this moment."""
    conninfo: str
    slots: tuple[Slot, ...]
    strays: tuple[str, ...] = ()
    """Logical slots from when it was the primary. They keep log that nobody will ask for."""

    def is_final(self, before: "StandbyView | None") -> bool:
        """Whether `progress` is all that it has on disk, and stays so. `before`: the look before this one, if any.

        One that was started again tells only how far it has replayed, until it has come to the end of its own log.
        """
        if self.receives:
            return False
        if self.has_asked:
            return True
        return self.waits_for_log and before is not None and before.waits_for_log and before.progress == self.progress


async def look_at_primary(server: Server, secrets: Secrets) -> PrimaryView:
    """Raises LocalClusterError."""
    async with as_superuser(server, secrets, ASK_TIMEOUT_S) as connection:
        in_recovery: bool = await connection.fetchval(_IN_RECOVERY)
        followers = [] if in_recovery else await connection.fetch(_FOLLOWERS)
        slots = await _slots(connection)
    return PrimaryView(in_recovery, {row["application_name"]: row["lag_bytes"] for row in followers}, slots)


async def look_at_standby(server: Server, secrets: Secrets) -> StandbyView:
    """Raises LocalClusterError."""
    async with as_superuser(server, secrets, ASK_TIMEOUT_S) as connection:
        row = await connection.fetchrow(_STANDBY)
        slots = await _slots(connection)
    assert row is not None
    return StandbyView(
        in_recovery=row["in_recovery"],
        progress=Progress(int(row["timeline"] or "0", 16), row["lsn"]),
        receives=row["receives"],
        has_asked=row["has_asked"],
        waits_for_log=row["waits_for_log"],
        conninfo=row["conninfo"],
        slots=slots,
        strays=tuple(row["strays"]),
    )


async def reached(servers: Iterable[Server], secrets: Secrets, *, within_s: float) -> dict[str, Progress]:
    """How far those standbys have the log on disk, once no more comes in. Their primary must be gone.

    One that has not heard of its primary's end when the time is up is left out, and one that cannot tell yet how far
    it is.
    """

    async def ask(server: Server) -> tuple[str, Progress] | None:
        before = None
        try:
            async with asyncio.timeout(within_s):
                while not (view := await look_at_standby(server, secrets)).is_final(before):
                    before = view
                    await asyncio.sleep(_POLL_S)
        except (LocalClusterError, TimeoutError):
            return None
        return (server.name, view.progress) if view.in_recovery else None

    return dict(filter(None, await asyncio.gather(*map(ask, servers))))


async def wait_for(server: Server, secrets: Secrets, members: Collection[str]) -> None:
    """Lets the server's commits wait for a quorum of `members` as soon as it is a primary. Raises LocalClusterError."""
    async with as_superuser(server, secrets, ASK_TIMEOUT_S) as connection:
        await _set(connection, {SYNCHRONOUS_STANDBY_NAMES: setting(members)})


async def follow(standby: Server, primary: Server, secrets: Secrets) -> None:
    """Makes a running standby follow `primary`. Raises LocalClusterError."""
    async with as_superuser(standby, secrets, ASK_TIMEOUT_S) as connection:
        await _set(
            connection, {PRIMARY_CONNINFO: conninfo(standby, primary), PRIMARY_SLOT_NAME: slot_name(standby.name)}
        )


async def promote(server: Server, secrets: Secrets) -> None:
    """Makes a standby take writes; does nothing to a primary. Raises LocalClusterError."""
    async with as_superuser(server, secrets, PROMOTE_TIMEOUT_S + ASK_TIMEOUT_S) as connection:
        if await connection.fetchval(_IN_RECOVERY) and not await connection.fetchval(_PROMOTE, int(PROMOTE_TIMEOUT_S)):
            raise LocalClusterError(f"{server.name} was not promoted within {PROMOTE_TIMEOUT_S:.0f} s")


async def checkpoint(server: Server, secrets: Secrets, *, within_s: float) -> None:
    """Writes what is dirty to disk, so that little is left to do when the server ends. Raises LocalClusterError."""
    async with as_superuser(server, secrets, within_s) as connection:
        await connection.execute("CHECKPOINT")


async def create_slots(server: Server, secrets: Secrets, names: Collection[str]) -> None:
    """Makes the slots that are missing, each keeping the log from now on. Raises LocalClusterError."""
    async with as_superuser(server, secrets, ASK_TIMEOUT_S) as connection:
        present = {row["slot_name"] for row in await connection.fetch(_SLOTS)}
        for name in sorted(set(names) - present):
            await connection.execute(_CREATE_SLOT, name)


async def drop_slots(server: Server, secrets: Secrets, names: Collection[str]) -> None:
    """Drops slots, and ends whoever still uses one. Raises LocalClusterError."""
    async with as_superuser(server, secrets, ASK_TIMEOUT_S * 2) as connection:
        for name in sorted(names):
            await connection.fetch(_END_SLOTS_USER, name)
            await connection.execute(_DROP_SLOT, name)


async def disconnect(primary: Server, secrets: Secrets, names: Collection[str]) -> None:
    """Ends what sends the log to the standbys named, which may connect again. Raises LocalClusterError."""
    async with as_superuser(primary, secrets, ASK_TIMEOUT_S * 2) as connection:
        await connection.fetch(_END_SENDERS, list(names))


async def _slots(connection: Connection) -> tuple[Slot, ...]:
    rows = await connection.fetch(_SLOTS)
    return tuple(Slot(row["slot_name"], row["active"], bool(row["lost"])) for row in rows)


async def _set(connection: Connection, values: Mapping[str, str]) -> None:
    for name, value in values.items():
        await connection.execute(await connection.fetchval(_ALTER_SYSTEM, name, value))
    await connection.execute(_RELOAD)
