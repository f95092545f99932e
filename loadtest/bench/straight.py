"""asyncpg straight to pgvector: what people write who need no cluster."""

from collections.abc import Sequence
from typing import Any

import asyncpg
from pgvector import HalfVector
from pgvector import Vector as SingleVector
from pgvector.asyncpg import register_vector

from loadtest.bench.contender import Endpoint, Row, Watch
from loadtest.bench.workload import K, Vector

TABLES = {
    # Table: type of its embeddings, and how they are stored.
    "plain_schema": ("vector", "EXTERNAL"),  # pgvector's default: out of the row when it is larger than 2 KB.
    "vector_plain": ("vector", "PLAIN"),
    "halfvec_plain": ("halfvec", "PLAIN"),
}


async def make_tables(dsn: str, dimensions: int) -> None:
    """The schema most people write, in three kinds of storage."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        for table, (kind, storage) in TABLES.items():
            await connection.execute(
                f"""
                CREATE TABLE {table} (
                    id uuid PRIMARY KEY,
                    user_id text NOT NULL,
                    content text NOT NULL,
                    metadata jsonb NOT NULL DEFAULT '{{}}',
                    embedding {kind}({dimensions:d}) NOT NULL,
                    created_at timestamptz NOT NULL DEFAULT now()
                );
                CREATE INDEX {table}_by_user ON {table} (user_id);
                ALTER TABLE {table} ALTER COLUMN embedding SET STORAGE {storage};
                """  # Names from above and a number.
            )
    finally:
        await connection.close()


class Straight:
    """A connection for each caller, and no pool's lock in between."""

    def __init__(self) -> None:
        self.watch = Watch()
        self._connections: list[asyncpg.Connection[asyncpg.Record]] = []

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        table, kind = endpoint["table"], endpoint["column"]
        self._as = HalfVector if kind == "halfvec" else SingleVector
        self._table = table
        self._search = (
            f"SELECT id, content, metadata, created_at, 1 - (embedding <=> $1) AS score FROM {table} "  # noqa: S608
            f"WHERE user_id = $2 ORDER BY embedding <=> $1 LIMIT {K}"
        )
        self._get = f"SELECT id, user_id, content, metadata, created_at FROM {table} WHERE id = $1 AND user_id = $2"  # noqa: S608
        self._store = f"INSERT INTO {table} (id, user_id, content, embedding) VALUES ($1, $2, $3, $4)"  # noqa: S608
        for _ in range(callers):
            connection = await asyncpg.connect(endpoint["dsn"])
            await register_vector(connection)
            self._connections.append(connection)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        rows = await self._connections[caller].fetch(self._search, self._as(query), user)
        return [str(row["id"]) for row in rows]

    async def store(self, caller: int, row: Row) -> None:
        await self._connections[caller].execute(self._store, row.id, row.user, row.content, self._as(row.embedding))

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        found = await self._connections[caller].fetchrow(self._get, memory_id, user)
        assert found is not None, "a memory is missing"
        return found

    get_again = get

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        await self._connections[caller].copy_records_to_table(
            self._table,
            records=[(row.id, row.user, row.content, self._as(row.embedding)) for row in rows],
            columns=("id", "user_id", "content", "embedding"),
        )


_DIGEST = bytes(32)


class SameTable(Straight):
    """COPY into a table like the shard's own, with all of its indexes: the most that a bulk load could reach."""

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        records = [
            (
                slot_number(row),
                row.user,
                row.id,
                b"\0" * 32,
                "",
                "",
                1,
                0.5,
                row.content,
                "{}",
                self._as(row.embedding),
                "",
            )
            for row in rows
        ]
        await self._connections[caller].copy_records_to_table(
            self._table,
            records=records,
            columns=(
                "slot", "user_id", "id", "digest", "agent_id", "session_id", "type", "importance", "content",
                "metadata", "embedding", "embedding_model",
            ),
        )  # fmt: skip


def slot_number(row: Row) -> int:
    """Some slot, the same for all of a user's rows."""
    return sum(row.user.encode()) % 16384
