"""A shard's database of the first schema becomes one of the newest, with what was in it."""

import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest_asyncio
from pgvector import HalfVector
from pgvector.asyncpg import register_vector

from common.catalog import PlacementStrategy, Precision
from common.migrations import migrate
from local.postgres import SUPERUSER
from memshard.internal.v1 import shard_pb2
from shard import changes, reads, requests, schema, store
from shard.identity import Identity
from tests.support.cluster import LocalCluster
from tests.support.wire import database

if TYPE_CHECKING:
    import asyncpg

IDENTITY = Identity(
    cluster_id=str(uuid.uuid4()),
    shard_id="shard-0",
    embedding_model="",
    dimensions=3,
    precision=Precision.HALF,
    placement=PlacementStrategy.USER_BASED,
    text_language="english",
)


@pytest_asyncio.fixture
async def old(cluster: LocalCluster) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """A database of its own, at the first schema."""
    plan = cluster.plan()
    server = plan.shard_server("shard-0")
    async with database(server.dsn(SUPERUSER, plan.secrets.postgres, "postgres")) as maintenance:
        await maintenance.execute("CREATE DATABASE upgraded")
        async with database(server.dsn(SUPERUSER, plan.secrets.postgres, "upgraded")) as connection:
            await connection.execute("CREATE EXTENSION vector")
            await register_vector(connection)
            assert await migrate(connection, schema.migrations(IDENTITY)[:1]) == [1]
            yield connection
        await maintenance.execute("DROP DATABASE upgraded")


async def test_what_an_older_version_stored_is_served_and_changed_by_the_newest(
    old: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    memory_id = str(uuid.uuid4())
    await old.execute("INSERT INTO owned_slots (slot, state) VALUES (7, 'own')")
    await old.execute(
        """
        INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                              embedding, embedding_model)
        VALUES (7, 'user', $1, 'digest', '', '', 1, 0.5, 'written long ago', '{}', $2, '')
        """,
        memory_id,
        HalfVector([1.0, 2.0, 3.0]),
    )
    digest = requests.digest_of("delete", memory_id)
    await old.execute(
        "INSERT INTO applied_requests (slot, user_id, request_id, digest, outcome) VALUES (7, 'user', 'r', $1, true)",
        digest,
    )
    newest = schema.migrations(IDENTITY)
    assert await migrate(old, newest) == [migration.number for migration in newest[1:]]
    slot = [shard_pb2.SlotRange(first=7, last=7)]
    (found,) = await reads.get(old, slot, memory_id, "user", include_embedding=True)
    assert (found.memory.content, list(found.memory.embedding)) == ("written long ago", [1, 2, 3])
    search = shard_pb2.SearchRequest(
        route=shard_pb2.Route(ranges=slot), user_id="user", words="wrote writing written", k=1
    )
    assert len((await reads.search(old, IDENTITY, search)).results) == 1
    # The request that was applied before has the same answer now, and no effect.
    assert await changes.delete(old, 7, "user", memory_id, "r")
    assert await reads.get(old, slot, memory_id, "user", include_embedding=False)
    await store.store(old, IDENTITY, 7, found.memory, b"digest")
