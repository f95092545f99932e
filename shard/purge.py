"""Clean-up in the background, in bounded batches: what has expired, and what has been kept for long enough.

Only in slots that are this shard's, which each statement holds on to like any write. While slots move there are rows of
others here, on their way in or about to be removed, and replication has to find them as they were.
"""

import asyncio
from dataclasses import dataclass

import asyncpg

from common import logs
from common.deadline import Deadline
from common.errors import Unavailable
from common.probe_user import PREFIX
from shard.database import Database

_log = logs.get_logger("purge")

# Rows changed by one statement: a few milliseconds, so that it never holds locks or the pool for long.
_BATCH = 500
_STATEMENT_TIMEOUT_S = 30.0

# What each statement looks for its rows in, and the locks that it takes; it waits for none.
_OWN = "JOIN owned_slots USING (slot) WHERE owned_slots.state = 'own' AND"
_LOCKED = "FOR UPDATE OF {table} SKIP LOCKED FOR SHARE OF owned_slots SKIP LOCKED"
_OF_MEMORIES = _LOCKED.format(table="memories")

# Expired: emptied like a deleted one, so that its id stays taken for as long. Each statement gives its count of rows.
_EMPTY_EXPIRED = f"""
WITH emptied AS (
    UPDATE memories SET deleted_at = now(), content = '', metadata = '{{}}', embedding = NULL, agent_id = '',
                        session_id = ''
    WHERE ctid = ANY (ARRAY(
        SELECT memories.ctid FROM memories {_OWN} expire_time <= now() AND deleted_at IS NULL LIMIT $1 {_OF_MEMORIES}
    ))
    RETURNING 1
)
SELECT count(*) FROM emptied
"""  # noqa: S608  # Constants, here as below.
# Whatever belongs to a tombstone and has contents still, however it came there.
_EMPTY_VERSIONS = f"""
WITH emptied AS (
    UPDATE memory_versions SET content = '', metadata = '{{}}', agent_id = '', session_id = ''
    WHERE ctid = ANY (ARRAY(
        SELECT memory_versions.ctid FROM memories JOIN memory_versions USING (slot, user_id, id)
        {_OWN} deleted_at IS NOT NULL AND memory_versions.content <> '' LIMIT $1
        {_LOCKED.format(table="memory_versions")}
    ))
    RETURNING 1
)
SELECT count(*) FROM emptied
"""  # noqa: S608
_REMOVE = """
WITH removed AS (
    DELETE FROM {table} WHERE ctid = ANY (ARRAY(
        SELECT {table}.ctid FROM {table} {own} {since} < now() - make_interval(secs => $2) LIMIT $1 {locked}
    ))
    RETURNING 1
)
SELECT count(*) FROM removed
"""
# With its versions: the id may be used again from now on, and its versions begin at 1.
_REMOVE_TOMBSTONES = f"""
WITH removed AS (
    DELETE FROM memories WHERE ctid = ANY (ARRAY(
        SELECT memories.ctid FROM memories {_OWN} deleted_at < now() - make_interval(secs => $2) LIMIT $1 {_OF_MEMORIES}
    ))
    RETURNING slot, user_id, id
), forgotten AS (
    DELETE FROM memory_versions USING removed
    WHERE (memory_versions.slot, memory_versions.user_id, memory_versions.id)
        = (removed.slot, removed.user_id, removed.id)
)
SELECT count(*) FROM removed
"""  # noqa: S608
# Nobody asks late for a probe of the health monitor, and there are thousands of them a day.
_REMOVE_PROBES = f"""
WITH removed AS (
    DELETE FROM memories WHERE ctid = ANY (ARRAY(
        SELECT memories.ctid FROM memories
        {_OWN} deleted_at < now() - make_interval(secs => $2) AND deleted_at > now() - interval '1 hour'
            AND starts_with(user_id, $3) LIMIT $1
        {_OF_MEMORIES}
    ))
    RETURNING slot, user_id, id
), forgotten AS (
    DELETE FROM memory_versions USING removed
    WHERE (memory_versions.slot, memory_versions.user_id, memory_versions.id)
        = (removed.slot, removed.user_id, removed.id)
), unasked AS (
    DELETE FROM applied_requests USING removed
    WHERE (applied_requests.slot, applied_requests.user_id, applied_requests.request_id)
        = (removed.slot, removed.user_id, removed.id::text)
)
SELECT count(*) FROM removed
"""  # noqa: S608
_PROBES_KEPT_S = 60.0


def _remove(table: str, since: str) -> str:
    return _REMOVE.format(table=table, since=since, own=_OWN, locked=_LOCKED.format(table=table))


_REMOVE_REQUESTS = _remove("applied_requests", since="applied_at")
_REMOVE_REQUEST_CLAIMS = _remove("request_claims", since="taken_at")
_REMOVE_ERASURES = _remove("erasures", since="applied_at")
_REMOVE_ERASED_IDS = _remove("erased_ids", since="erased_at")
_REMOVE_VERSIONS = _remove("memory_versions", since="replaced_at")


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what is kept is kept, in seconds."""

    tombstone_s: float
    version_s: float


async def run(database: Database, retention: Retention, *, interval_s: float) -> None:
    """Purges every `interval_s` until cancelled; a database that is away is tried again the next time."""
    while True:
        try:
            await purge(database, retention)
        except (Unavailable, TimeoutError, asyncpg.PostgresError) as error:
            _log.warning("purge put off", error=type(error).__name__)
        await asyncio.sleep(interval_s)


async def purge(database: Database, retention: Retention, *, batch: int = _BATCH) -> int:
    """Empties what has expired and removes what was kept for long enough; returns how many rows that was.

    One statement takes at most `batch` rows. What the health monitor left is not counted: it would be all that is told.
    """
    changed = 0
    for statement, arguments in (
        (_EMPTY_EXPIRED, ()),
        (_EMPTY_VERSIONS, ()),
        (_REMOVE_TOMBSTONES, (retention.tombstone_s,)),
        (_REMOVE_REQUESTS, (retention.tombstone_s,)),
        (_REMOVE_REQUEST_CLAIMS, (retention.tombstone_s,)),
        (_REMOVE_ERASURES, (retention.tombstone_s,)),
        (_REMOVE_ERASED_IDS, (retention.tombstone_s,)),
        (_REMOVE_VERSIONS, (retention.version_s,)),
    ):
        changed += await _all_of(database, batch, statement, arguments)
    # Last, as it looks at each tombstone of an hour; what is older goes with the others.
    await _all_of(database, batch, _REMOVE_PROBES, (_PROBES_KEPT_S, PREFIX))
    if changed:
        _log.info("purged", rows=changed)
    return changed


async def _all_of(database: Database, batch: int, statement: str, arguments: tuple[object, ...]) -> int:
    """Runs a statement until it finds no more; how many rows it changed."""
    changed = 0
    while True:
        deadline = Deadline.after(_STATEMENT_TIMEOUT_S)
        async with deadline.bound(), database.reading(deadline) as connection:
            count: int = await connection.fetchval(statement, batch, *arguments)
        changed += count
        if count < batch:
            return changed
