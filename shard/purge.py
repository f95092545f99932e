"""Clean-up in the background, in bounded batches: what has expired, and tombstones and request ids past their day."""

import asyncio

import asyncpg

from common import logs
from common.deadline import Deadline
from common.errors import Unavailable
from common.postgres import Connection
from shard.database import Database

_log = logs.get_logger("purge")

# Rows deleted by one statement: a few milliseconds, so that it never holds locks or the pool for long.
_BATCH = 500
_STATEMENT_TIMEOUT_S = 30.0

# Expired: emptied like a deleted one, so that its id stays taken for as long.
_EMPTY_EXPIRED = """
UPDATE memories SET deleted_at = now(), content = '', metadata = '{}', embedding = NULL, agent_id = '', session_id = ''
WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM memories WHERE expire_time <= now() AND deleted_at IS NULL LIMIT $1 FOR UPDATE SKIP LOCKED
))
"""
_PURGE_TOMBSTONES = """
DELETE FROM memories WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM memories WHERE deleted_at < now() - make_interval(secs => $1) LIMIT $2 FOR UPDATE SKIP LOCKED
))
"""
_PURGE_REQUESTS = """
DELETE FROM applied_requests WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM applied_requests WHERE applied_at < now() - make_interval(secs => $1)
    LIMIT $2 FOR UPDATE SKIP LOCKED
))
"""


async def run(database: Database, *, ttl_s: float, interval_s: float) -> None:
    """Purges every `interval_s` until cancelled; a database that is away is tried again the next time."""
    while True:
        try:
            await purge(database, ttl_s=ttl_s)
        except (Unavailable, TimeoutError, asyncpg.PostgresError) as error:
            _log.warning("purge put off", error=type(error).__name__)
        await asyncio.sleep(interval_s)


async def purge(database: Database, *, ttl_s: float, batch: int = _BATCH) -> int:
    """Empties what has expired and removes what is older than `ttl_s`; returns how many rows that was.

    One statement takes at most `batch` rows.
    """
    removed = 0
    for statement, arguments in (
        (_EMPTY_EXPIRED, ()),
        (_PURGE_TOMBSTONES, (float(ttl_s),)),
        (_PURGE_REQUESTS, (float(ttl_s),)),
    ):
        while True:
            deadline = Deadline.after(_STATEMENT_TIMEOUT_S)
            async with deadline.bound(), database.reading(deadline) as connection:
                count = await _change_batch(connection, statement, *arguments, batch)
            removed += count
            if count < batch:
                break
    if removed:
        _log.info("purged", rows=removed)
    return removed


async def _change_batch(connection: Connection, statement: str, *arguments: float) -> int:
    status = await connection.execute(statement, *arguments)
    return int(status.rsplit(" ", 1)[1])
