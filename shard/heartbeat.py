"""The heartbeat: a row that says, in the log itself, when and on which timeline the primary was alive.

A standby that has replayed a heartbeat has everything that was committed before it. That is how a replica knows how old
its answers are, and which timeline it is on (docs/decisions/0010-replicas.md).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from common import logs
from common.postgres import CONNECT_ERRORS
from shard.log_seen import LogSeen
from shard.position import TIMELINE, read_position

if TYPE_CHECKING:
    import asyncpg

_log = logs.get_logger("heartbeat")

# A server that does not take a row in this time is given up, and looked for anew.
_TIMEOUT_S = 2.0
_RETRY_S = 0.25

# A heartbeat waits for no standby: one that did would stop when the standbys do, and be missed by those that are left.
_NO_WAITING = "SET synchronous_commit = local"
_BEAT = f"""
INSERT INTO heartbeats (timeline, at) VALUES ({TIMELINE}, clock_timestamp())
ON CONFLICT (singleton) DO UPDATE SET timeline = excluded.timeline, at = excluded.at
"""  # noqa: S608  # A constant.


async def run(
    connect: "Callable[[], Awaitable[asyncpg.Connection[asyncpg.Record]]]", seen: LogSeen, *, interval_s: float
) -> None:
    """Beats every `interval_s` until cancelled, on a connection of its own; a server that is lost is looked for again.

    With each beat it sees how far the log has come, so that reads can say how fresh they are though nobody writes.

    The first beat is at once, so that replicas notice a new timeline as soon as it begins.
    """
    beating: bool | None = None
    while True:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                connection = await connect()
            try:
                await connection.execute(_NO_WAITING)
                while True:
                    async with asyncio.timeout(_TIMEOUT_S):
                        await connection.execute(_BEAT)
                        here = await read_position(connection)
                    seen.observe(here.timeline, here.lsn)
                    beating = True
                    await asyncio.sleep(interval_s)
            finally:
                connection.terminate()
        except CONNECT_ERRORS as error:
            if beating is not False:
                _log.warning("no heartbeats: the database does not take them", error=type(error).__name__)
            beating = False
        await asyncio.sleep(min(interval_s, _RETRY_S))
