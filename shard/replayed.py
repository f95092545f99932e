"""Waiting until every standby has replayed something: what an erasure does before it says that all is gone."""

import asyncio

from common.deadline import Deadline
from shard.database import Database

# As long as a caller waits at most for standbys to replay what usually takes them milliseconds.
_PATIENCE_S = 3.0
# Kept back from the caller's deadline, so that it hears who has not, also of a machine that stood still for a moment;
# of a short one, half.
_ANSWER_MARGIN_S = 0.5
_POLL_S = 0.02

# A standby that is away is known by its replication slot. Without the privilege to look (pg_monitor) those that are
# there have no name and no position, and nothing can be said of them. Subscribers get rows, not pages: they are not
# replicas. A standby that is only being made will replay it before it serves.
_BEHIND = """
SELECT coalesce(slot_name, nullif(application_name, ''), 'pid ' || pid) AS name
FROM pg_stat_replication LEFT JOIN pg_replication_slots ON active_pid = pid
WHERE coalesce(slot_type = 'physical', true) AND coalesce(replay_lsn - '0/0' < $1, true)
    AND coalesce(state, '') <> 'backup'
UNION
SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT active
ORDER BY name
"""


async def standbys_behind(database: Database, lsn: int, deadline: Deadline) -> list[str]:
    """Waits until every standby that the primary knows of has replayed its log up to `lsn`.

    Returns those that have not when the time is up. Raises Unavailable when the primary itself does not answer.
    """
    left_s = deadline.remaining_s()
    patience = Deadline.after(min(_PATIENCE_S, max(left_s - _ANSWER_MARGIN_S, left_s / 2)))
    while True:
        async with database.reading(deadline) as connection:
            behind = [row["name"] for row in await connection.fetch(_BEHIND, lsn)]
        if not behind or not patience.remaining_s():
            return behind
        await asyncio.sleep(_POLL_S)
