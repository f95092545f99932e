"""Where the write-ahead log is: what consistency tokens are made of."""

from common.postgres import Connection
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb

# pg_walfile_name begins with the timeline in hex; pg_control_checkpoint still has the old one after a promotion.
_POSITION = """
SELECT ('x' || left(pg_walfile_name(lsn), 8))::bit(32)::int AS timeline, (lsn - '0/0')::bigint AS lsn
FROM (SELECT pg_current_wal_lsn() AS lsn) AS here
"""


async def read_position(connection: Connection) -> shard_pb2.Commit:
    """How far the write-ahead log has come; asked after a commit, it covers that commit."""
    row = await connection.fetchrow(_POSITION)
    assert row is not None
    return shard_pb2.Commit(timeline=row["timeline"], lsn=row["lsn"], durability=pb.DURABILITY_LOCAL)
