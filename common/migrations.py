"""Numbered schema changes, each applied once, in order, under a lock that several starting processes wait for."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.postgres import Connection

# Any constant will do, as long as nothing else in these databases takes the same advisory lock.
_LOCK = 0x6D656D7368617264  # "memshard"

_CREATE_LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number int PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One schema change. `sql` may hold several statements; it runs in a transaction of its own."""

    number: int
    name: str
    sql: str


class NewerSchemaError(Exception):
    """The database was migrated by a newer version of memshard than this one."""


async def migrate(connection: Connection, migrations: Sequence[Migration]) -> list[int]:
    """Applies the migrations that the database lacks; returns their numbers.

    Raises NewerSchemaError when the database has one that this program does not know.
    """
    applied: list[int] = []
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
    try:
        await connection.execute(_CREATE_LEDGER)
        present = {row["number"] for row in await connection.fetch("SELECT number FROM schema_migrations")}
        unknown = present - {migration.number for migration in migrations}
        if unknown:
            raise NewerSchemaError(
                f"the database has schema change {max(unknown)}, which this version does not know; "
                "run the version that made it, or a newer one"
            )
        for migration in sorted(migrations, key=lambda m: m.number):
            if migration.number in present:
                continue
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO schema_migrations (number, name) VALUES ($1, $2)",
                    migration.number,
                    migration.name,
                )
            applied.append(migration.number)
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    return applied
