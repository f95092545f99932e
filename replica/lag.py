"""How far the standby is behind its primary: what it says of itself."""

import asyncio
import math
from dataclasses import dataclass

import asyncpg

from common.postgres import CONNECT_ERRORS, Connection
from replica.freshness import Replayed, is_serving

# A standby that does not answer in this time is as good as away.
_PROBE_TIMEOUT_S = 1.0
_MOST_MS = 2**53

_REPLAYED = """
SELECT pg_is_in_recovery() AS in_recovery, coalesce((pg_last_wal_replay_lsn() - '0/0')::bigint, 0) AS lsn,
       timeline, extract(epoch FROM clock_timestamp() - at)::float8 AS age_s
FROM (VALUES (1)) AS one LEFT JOIN heartbeats ON true
"""
# What is received can lie before what is replayed: after a restart it is counted from the beginning of a segment. The
# timeline that is being received needs a privilege (pg_read_all_stats), and without it is unknown.
_RECEIVED = """
SELECT greatest(pg_last_wal_receive_lsn() - pg_last_wal_replay_lsn(), 0)::bigint AS lag_bytes,
       (SELECT received_tli FROM pg_stat_wal_receiver) AS timeline
"""


@dataclass(frozen=True, slots=True)
class Received:
    """What the standby has received: its timeline, 0 when that is unknown, and how much of it is not replayed yet."""

    timeline: int
    lag_bytes: int


async def replayed(connection: Connection) -> Replayed:
    """How far this server has come, as a statement of its own."""
    row = await connection.fetchrow(_REPLAYED)
    assert row is not None
    if row["timeline"] is None:
        return Replayed(row["in_recovery"], row["lsn"])
    return Replayed(row["in_recovery"], row["lsn"], row["timeline"], row["age_s"])


async def received(connection: Connection) -> Received:
    """What has come from the primary."""
    row = await connection.fetchrow(_RECEIVED)
    assert row is not None
    return Received(row["timeline"] or 0, row["lag_bytes"] or 0)


def in_ms(age_s: float) -> int:
    """Seconds of lag as they travel; the largest number when no heartbeat has come yet."""
    return max(0, round(min(age_s * 1000, _MOST_MS)))


class Probe:
    """Whether the standby should be asked, found out on a connection of its own: a busy pool is no bad health."""

    def __init__(self, dsn: str, max_lag_s: float) -> None:
        self._dsn = dsn
        self._max_lag_s = max_lag_s
        self.promoted = False
        """Whether the server that was looked at last was no standby any more."""
        self.age_s: float | None = None
        """How old the standby's data was at the last look; None when it did not say."""
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def is_serving(self) -> bool:
        """Whether the server answers within a second, is a standby, and not too far behind."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                if self._connection is None:
                    self._connection = await asyncpg.connect(self._dsn)
                seen = await replayed(self._connection)
        except CONNECT_ERRORS:
            self.promoted, self.age_s = False, None
            self.close()
            return False
        self.age_s = seen.age_s if math.isfinite(seen.age_s) else None
        self.promoted = not seen.in_recovery
        if self.promoted:
            # The next look goes by the URL again, which may name a Service: of whichever servers are standbys.
            self.close()
        return is_serving(seen, self._max_lag_s)

    def close(self) -> None:
        """Drops the connection."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
