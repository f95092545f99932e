"""Where the write-ahead log is: what consistency tokens are made of."""

from dataclasses import dataclass

from common.postgres import Connection

# The timeline that a primary writes. pg_walfile_name begins with it, in hex; pg_control_checkpoint still has the old
# one after a promotion.
TIMELINE = "('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int"

# Flushed and not merely written: a commit that has returned is flushed, and a token that asked for more would make its
# bearer wait for what others have only begun.
_POSITION = f"""
SELECT {TIMELINE} AS timeline, (pg_current_wal_flush_lsn() - '0/0')::bigint AS lsn,
       current_setting('synchronous_standby_names') <> '' AS waits, current_setting('cluster_name') AS server
"""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a primary's log, the primary's name, and whether its setting makes commits wait for standbys."""

    timeline: int
    lsn: int
    waits: bool
    server: str


async def read_position(connection: Connection) -> Position:
    """How far the write-ahead log has come; asked after a commit, it covers that commit."""
    row = await connection.fetchrow(_POSITION)
    assert row is not None
    return Position(row["timeline"], row["lsn"], row["waits"], row["server"])
