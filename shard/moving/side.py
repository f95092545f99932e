"""One side of a move: a session with the primary of a shard, which holds the move's lock there.

What a move changes in a shard it changes in this session. A mover that was thought dead, and was only slow, has lost
the session before another can have the lock, and with it the right to change anything.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.catalog_moves import LEASE_CLASS, end_hung
from common.config import MOVER_HUNG_AFTER_S
from common.postgres import CONNECT_ERRORS, NOTICE_LOSS, explain
from shard import identity
from shard.primary import Newest, Primary

if TYPE_CHECKING:
    from shard.identity import Identity
    from shard.primary import PrimaryConnection

_FIND_TIMEOUT_S = 10.0
# A session of a mover that was killed ends when its server notices: within the interval below, or one statement.
_LOCK_TIMEOUT_S = 30.0
_POLL_S = 0.1

_SETTINGS = {
    **NOTICE_LOSS,
    "application_name": "memshard mover",
    # A server that is at a long statement finds out that the mover is gone.
    "client_connection_check_interval": "500ms",
    # Rows are compared as text.
    "timezone": "UTC",
    "datestyle": "ISO",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "synchronous_commit": "on",
    "statement_timeout": "0",
    "jit": "off",
}
# The last thing in a shard's schema that a mover asks for.
_IS_MIGRATED = "SELECT to_regproc('fence_slots') IS NOT NULL"
_LOCK = "SELECT pg_try_advisory_lock($1, $2)"
_SERVER = "SELECT system_identifier::text AS system, current_setting('cluster_name') AS name FROM pg_control_system()"


class SideError(Exception):
    """A shard's database is not what a move needs; the message says what to do."""


class UnreachableError(SideError):
    """Nobody answers there, neither a primary nor a standby; nor does anybody say why he lets nobody in."""


@dataclass(frozen=True, slots=True)
class Side:
    """The session, and what is known of the shard."""

    shard_id: str
    dsn: str
    connection: "PrimaryConnection"
    identity: "Identity"
    system: str
    """What tells this server and its standbys from others: part of the names of some replication slots."""
    server: str
    """The name of this server alone; empty when it has none. It stays the same for as long as the session lasts."""

    @property
    def timeline(self) -> int:
        """The timeline that the server writes. It stays the same for as long as the session lasts."""
        return self.connection.timeline


@asynccontextmanager
async def opened(
    shard_id: str, dsn: str, move_id: int, *, hung_after_s: float = MOVER_HUNG_AFTER_S
) -> AsyncIterator[Side]:
    """A session that has the lock of a move, for who has its lease. Who had it before and still has the lock has lost
    the lease: the session ends when that is noticed, and is ended when it has done nothing for `hung_after_s`.

    Raises SideError: it cannot be reached, is another shard's, or another mover has the lock.
    """
    primary = Primary(dsn, Newest())
    try:
        await primary.find(_FIND_TIMEOUT_S)
        connection = await primary.connect(server_settings=_SETTINGS)
    except CONNECT_ERRORS as error:
        kind = SideError if primary.has_answered else UnreachableError
        raise kind(f"the database of {shard_id} cannot be reached: {explain(error)}") from error
    try:
        known = await identity.read(connection)
        if known is None or known.shard_id != shard_id:
            raise SideError(f"the database given for {shard_id} belongs to {known.shard_id if known else 'nobody yet'}")
        if not await connection.fetchval(_IS_MIGRATED):
            raise SideError(f"the service of {shard_id} is older than this mover; restart it first")
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not await connection.fetchval(_LOCK, LEASE_CLASS, move_id):
            if time.monotonic() >= deadline:
                raise SideError(f"another mover is at work on move {move_id} in {shard_id}")
            await end_hung(connection, move_id, hung_after_s)
            await asyncio.sleep(_POLL_S)
        server = await connection.fetchrow(_SERVER)
        assert server is not None
        yield Side(shard_id, dsn, connection, known, server["system"], server["name"])
    finally:
        connection.terminate()
