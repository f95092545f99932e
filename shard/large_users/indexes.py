"""Making and dropping the users' own indexes, and the table that says whose they are.

An index is partial, by a hash of the user's name: no name is in the database's catalog, nor need any be quoted. It is
made and dropped CONCURRENTLY, by one session at a time, which holds an advisory lock meanwhile: so an index that is not
valid when the lock is had is one whose maker has died.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from common import logs
from common.catalog import PlacementStrategy
from common.postgres import Connection
from common.telemetry.registry import OWN_INDEX_BUILD_DURATION, OWN_INDEX_BUILDS
from shard.identity import Identity
from shard.large_users.plan import Bounds, Existing, LargeUser
from shard.moving.tables import STREAM_PREFIX
from shard.schema import USER_KEY

_log = logs.get_logger("own indexes")

# From the beginning: of a counter that appears with the first of them, nobody sees the increase.
_BUILDS = {outcome: OWN_INDEX_BUILDS.labels(outcome) for outcome in ("made", "failed")}

# The two keys of the advisory lock. Any numbers will do that nothing else here takes.
_LOCK = (0x6F776E, 0)  # "own"
_LOCK_POLL_S = 0.5
_PREFIX = "memories_own_"
SHARED = "memories_shared"
"""Name of the index of all memories. In `own_indexes` it has no key, and its hash is empty."""
# Beyond those that there may be indexes for: rows that came with a move, and are nobody's yet.
_MOST_USERS = 1000

_TRY_LOCK = "SELECT pg_try_advisory_lock($1, $2)"
_UNLOCK = "SELECT pg_advisory_unlock($1, $2)"
_LIMIT_MEMORY = "SELECT set_config('maintenance_work_mem', $1, false)"
# One process and no more: builds take turns with what serves, and have no use for shared memory, which containers
# have little of.
_NO_WORKERS = "SET max_parallel_maintenance_workers = 0"

# Each user's rows are together in an index, which is gone through once.
_COUNT = """
WITH large AS (
    SELECT {slot} AS slot, user_id, count(*) AS rows FROM memories WHERE deleted_at IS NULL
    GROUP BY {group} HAVING count(*) >= $1
)
SELECT * FROM (
    SELECT slot, user_id, {key} AS key, sha256(convert_to(user_id, 'UTF8')) AS user_hash,
           {own} AS own,
           rows - (SELECT count(*) FROM memories WHERE {same} AND embedding IS NULL AND deleted_at IS NULL) AS rows
    FROM large
) AS counted
WHERE rows >= $1 ORDER BY rows DESC LIMIT $2
"""
_COUNT_IN_ONE_SLOT = _COUNT.format(
    slot="slot",
    group="slot, user_id",
    key=USER_KEY,
    own="EXISTS (SELECT FROM owned_slots WHERE owned_slots.slot = large.slot AND state = 'own')",
    same="memories.slot = large.slot AND memories.user_id = large.user_id",
)
_COUNT_IN_MANY_SLOTS = _COUNT.format(
    slot="NULL::int",
    group="user_id",
    key=USER_KEY,
    own="true",
    same="memories.user_id = large.user_id",
)

_EXISTING = """
SELECT name, key, measured_rows FROM own_indexes JOIN pg_index ON indexrelid = to_regclass(name) WHERE indisvalid
"""
# Each of the two by an index of its own; together they would be counted row by row.
_COUNT_ALL = """
SELECT (SELECT count(*) FROM memories WHERE deleted_at IS NULL)
    - (SELECT count(*) FROM memories WHERE embedding IS NULL AND deleted_at IS NULL)
"""
_MOVES = """
SELECT EXISTS (SELECT FROM pg_publication WHERE starts_with(pubname, $1))
    OR EXISTS (SELECT FROM pg_subscription WHERE starts_with(subname, $1))
"""
# What a maker that died has left, or somebody else: an index that cannot be used, or that nobody knows.
_LEFT_OVER = """
SELECT relname, indexrelid::bigint AS oid
FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid LEFT JOIN own_indexes ON name = relname
WHERE indrelid = 'memories'::regclass AND (starts_with(relname, $1) OR relname = $2)
    AND NOT (indisvalid AND name IS NOT NULL)
"""
_FORGET_MISSING = "DELETE FROM own_indexes WHERE to_regclass(name) IS NULL"
_FORGET = "DELETE FROM own_indexes WHERE name = $1"
_RECORD = """
INSERT INTO own_indexes (name, key, user_hash, slot) VALUES ($1, $2, $3, $4) ON CONFLICT (name) DO NOTHING
"""
_MEASURED = "UPDATE own_indexes SET ef_few = $2, ef_many = $3, measured_rows = $4 WHERE name = $1"
# These statements take no parameters, so the server makes them from some.
_CREATE = f"""
SELECT format('CREATE INDEX CONCURRENTLY %I ON memories USING hnsw (embedding %I)
               WHERE {USER_KEY} = %L::bigint AND deleted_at IS NULL', $1::text, $2::text, $3::bigint)
"""
_CREATE_SHARED = """
SELECT format('CREATE INDEX CONCURRENTLY %I ON memories USING hnsw (embedding %I)
               WHERE deleted_at IS NULL AND slot >= 0', $1::text, $2::text)
"""
# What tells one from another in a log: the name has a hash in it that whoever guesses a user's name can make as well.
_OID = "SELECT to_regclass($1)::oid::bigint"
_DROP = "SELECT format('DROP INDEX CONCURRENTLY IF EXISTS %I', $1::text)"
_OF_SLOTS = """
SELECT key, user_hash, slot, ef_few, ef_many, measured_rows FROM own_indexes
JOIN pg_index ON indexrelid = to_regclass(name) WHERE indisvalid AND slot BETWEEN $1 AND $2
"""


@asynccontextmanager
async def alone(connection: Connection, *, patience_s: float = 0.0) -> AsyncIterator[bool]:
    """Whether nobody else makes or drops indexes until the end; it waits `patience_s` for that."""
    deadline = time.monotonic() + patience_s
    while not (had := await connection.fetchval(_TRY_LOCK, *_LOCK)):
        if time.monotonic() >= deadline:
            break
        await asyncio.sleep(_LOCK_POLL_S)
    try:
        yield had
    finally:
        if had and not connection.is_closed():
            await connection.execute(_UNLOCK, *_LOCK)


async def large_users(connection: Connection, identity: Identity, bounds: Bounds) -> list[LargeUser]:
    """The users with memories enough to keep an index, the largest first."""
    in_one_slot = identity.placement is PlacementStrategy.USER_BASED
    rows = await connection.fetch(
        _COUNT_IN_ONE_SLOT if in_one_slot else _COUNT_IN_MANY_SLOTS, bounds.kept_rows, _MOST_USERS
    )
    return [
        LargeUser(row["key"], row["user_hash"], row["slot"], row["rows"], row["own"], row["user_id"]) for row in rows
    ]


async def existing(connection: Connection) -> list[Existing]:
    """The users' indexes that can be used."""
    rows = await connection.fetch(_EXISTING)
    return [Existing(row["name"], row["key"], row["measured_rows"]) for row in rows if row["key"] is not None]


async def shared(connection: Connection) -> tuple[bool, int | None]:
    """Whether there is the index of all memories, and how many there were when its recall was measured."""
    rows = await connection.fetch(_EXISTING)
    return next(((True, row["measured_rows"]) for row in rows if row["key"] is None), (False, None))


async def count_all(connection: Connection) -> int:
    """How many memories have an embedding."""
    count: int = await connection.fetchval(_COUNT_ALL)
    return count


async def has_moves(connection: Connection) -> bool:
    """Whether slots are moving from here or to here: a publication waits for a build, and breaks it off."""
    found: bool = await connection.fetchval(_MOVES, STREAM_PREFIX)
    return found


async def tidy(connection: Connection) -> None:
    """Drops what makers that died have left. For who is `alone`."""
    for row in await connection.fetch(_LEFT_OVER, _PREFIX, SHARED):
        _log.warning("an index is left over", index=row["oid"])
        await drop(connection, row["relname"])
    await connection.execute(_FORGET_MISSING)


async def drop(connection: Connection, name: str) -> None:
    """Drops an index. For who is `alone`."""
    oid = await connection.fetchval(_OID, name)
    await connection.execute(await connection.fetchval(_DROP, name))
    await connection.execute(_FORGET, name)
    _log.info("dropped", index=oid)


async def build(connection: Connection, identity: Identity, user: LargeUser, *, memory_mb: int) -> None:
    """Makes a user's index, if there is none; returns once it can be used. For who is `alone`."""
    name = _name_of(user)
    # Before the index, so that one whose maker dies is known to be ours.
    await connection.execute(_RECORD, name, user.key, user.user_hash, user.slot)
    statement = await connection.fetchval(_CREATE, name, _operators(identity), user.key)
    await _make(connection, name, statement, rows=user.rows, memory_mb=memory_mb)


async def build_shared(connection: Connection, identity: Identity, rows: int, *, memory_mb: int) -> None:
    """Makes the index of all memories, of which there are `rows`, in the same way."""
    await connection.execute(_RECORD, SHARED, None, b"", None)
    statement = await connection.fetchval(_CREATE_SHARED, SHARED, _operators(identity))
    await _make(connection, SHARED, statement, rows=rows, memory_mb=memory_mb)


async def _make(connection: Connection, name: str, statement: str, *, rows: int, memory_mb: int) -> None:
    await connection.execute(_LIMIT_MEMORY, f"{memory_mb}MB")
    await connection.execute(_NO_WORKERS)
    began = time.monotonic()
    try:
        await connection.execute(statement)
    except Exception:
        # Whoever is cancelled did not fail: it is made the next time.
        _BUILDS["failed"].inc()
        raise
    seconds = time.monotonic() - began
    _BUILDS["made"].inc()
    OWN_INDEX_BUILD_DURATION.observe(seconds)
    _log.info("made", index=await connection.fetchval(_OID, name), rows=rows, seconds=round(seconds, 1))


async def record_measured(connection: Connection, user: LargeUser, ef_few: int | None, ef_many: int | None) -> None:
    """Writes down with what effort the index is as good as an exact search; None: with none."""
    await connection.execute(_MEASURED, _name_of(user), ef_few, ef_many, user.rows)


async def record_shared(connection: Connection, rows: int, ef_few: int | None, ef_many: int | None) -> None:
    """The same of the index of all memories, of which there were `rows`."""
    await connection.execute(_MEASURED, SHARED, ef_few, ef_many, rows)


def _name_of(user: LargeUser) -> str:
    return f"{_PREFIX}{user.key % 2**64:016x}"


def _operators(identity: Identity) -> str:
    return f"{identity.vector_type}_cosine_ops"


async def follow(
    source: Connection,
    target: Connection,
    identity: Identity,
    first: int,
    last: int,
    *,
    memory_mb: int,
    patience_s: float,
) -> int:
    """Makes on the target of a move what the source has for users of the slots `first` to `last`; how many that were.

    Where users are in many slots, their index has nothing to do with the slots of one move. What goes wrong is told in
    the log: the target serves without an index, and makes it later.
    """
    made = 0
    try:
        wanted = await source.fetch(_OF_SLOTS, first, last)
        if not wanted:
            return made
        async with alone(target, patience_s=patience_s) as had:
            if not had:
                _log.warning("somebody else makes indexes; those of a move are made later")
                return made
            await tidy(target)
            for row in wanted:
                made += await _followed(target, identity, row, memory_mb)
    except asyncpg.PostgresError as error:
        _log.warning("indexes of a move could not be made", error=type(error).__name__)
    return made


async def _followed(target: Connection, identity: Identity, row: asyncpg.Record, memory_mb: int) -> bool:
    user = LargeUser(row["key"], row["user_hash"], row["slot"], row["measured_rows"] or 0, own=False, user_id="")
    try:
        if user.key not in {index.key for index in await existing(target)}:
            await build(target, identity, user, memory_mb=memory_mb)
            if row["measured_rows"] is not None:
                await record_measured(target, user, row["ef_few"], row["ef_many"])
    except asyncpg.PostgresError as error:
        # The others' may be.
        _log.warning("an index of a move could not be made", error=type(error).__name__)
        return False
    return True
