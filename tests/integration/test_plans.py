"""The statements of reads use the indexes that are there for them."""

import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from pgvector.asyncpg import register_vector

from memshard.internal.v1 import shard_pb2
from shard import reads
from tests.integration.test_upgrade import IDENTITY
from tests.support.cluster import LocalCluster
from tests.support.wire import database

if TYPE_CHECKING:
    import asyncpg

ROWS = 20_000
WHALE = "planned-whale"
HALF = 8192  # The slots of the first of two shards.
EVERY = (0, HALF - 1)


class Explaining:
    """A connection that shows the plan of what it is asked, after running it."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection
        self.plan = ""

    async def fetch(self, statement: str, *parameters: Any) -> Any:
        lines = await self._connection.fetch(f"EXPLAIN {statement}", *parameters)
        self.plan = "\n".join(line[0] for line in lines)
        return await self._connection.fetch(statement, *parameters)


async def load(cluster: LocalCluster, slot: str, rows: int) -> None:
    """Memories of a thousand users, and those beyond ROWS of one; the n-th in a slot that shard-0 has."""
    async with database(cluster.shard_dsn("shard-0", owner=True)) as connection:
        await connection.execute(
            f"""
            INSERT INTO memories (slot, user_id, id, digest, agent_id, session_id, type, importance, content, metadata,
                                  embedding_model, embedding)
            SELECT {slot}, CASE WHEN n > {ROWS} THEN '{WHALE}' ELSE 'planned-' || n % 1000 END,
                   gen_random_uuid(), '', '', '', 1, 0.5, 'the quick fox number' || n || ' jumps', '{{}}', '',
                   array_fill(0.1::real, ARRAY[256])::vector::halfvec
            FROM generate_series(1, {rows}) AS n
            """
        )
        await connection.execute("ANALYZE memories")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def loaded(cluster: LocalCluster) -> LocalCluster:
    """A user's memories are in one slot."""
    await load(cluster, "n % 1000", ROWS)
    return cluster


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["content_hash", "temporal"])
async def spread(request: pytest.FixtureRequest) -> AsyncIterator[LocalCluster]:
    """A user's memories are in any of them."""
    async with LocalCluster(shards=2, options=["--placement", request.param]) as running:
        await load(running, f"n * 37 % {HALF}", 2 * ROWS)
        yield running


def route(*ranges: tuple[int, int]) -> shard_pb2.Route:
    return shard_pb2.Route(ranges=[shard_pb2.SlotRange(first=first, last=last) for first, last in ranges])


@pytest.mark.parametrize(
    ("request_", "index"),
    [
        (shard_pb2.SearchRequest(route=route((0, 4095)), words="number777 nothing", k=5), "memories_words"),
        (shard_pb2.SearchRequest(route=route((7, 7)), user_id="planned-7", words="fox", k=5), "Index Cond: ((slot"),
        (shard_pb2.ListRequest(route=route((7, 7)), user_id="planned-7", page_size=5), "memories_newest_first"),
        (shard_pb2.GetRequest(route=route((0, 4095)), id=str(uuid.uuid4())), "memories_by_id"),
        (shard_pb2.GetRequest(route=route((7, 7)), id=str(uuid.uuid4()), user_id="planned-7"), "memories_"),
    ],
)
async def test_a_read_goes_by_an_index(loaded: LocalCluster, request_: Any, index: str) -> None:
    await check_plan(loaded, request_, index)


@pytest.mark.parametrize(
    ("request_", "index"),
    [
        (shard_pb2.SearchRequest(route=route(EVERY), words="number777 nothing", k=5), "memories_words"),
        (shard_pb2.SearchRequest(route=route(EVERY), user_id="planned-7", words="fox", k=5), "memories_of_user"),
        (shard_pb2.SearchRequest(route=route(EVERY), user_id=WHALE, words="number30777", k=5), "memories_words"),
        (shard_pb2.ListRequest(route=route(EVERY), user_id="planned-7", page_size=5), "memories_of_user"),
        (shard_pb2.ListRequest(route=route(EVERY), user_id=WHALE, page_size=1000), "memories_of_user"),
        (shard_pb2.GetRequest(route=route(EVERY), id=str(uuid.uuid4())), "memories_by_id"),
        (shard_pb2.GetRequest(route=route((7, 7)), id=str(uuid.uuid4()), user_id=WHALE), "memories_"),
    ],
)
async def test_a_read_of_a_user_in_many_slots_goes_by_an_index(spread: LocalCluster, request_: Any, index: str) -> None:
    await check_plan(spread, request_, index)


@pytest.mark.parametrize(
    "request_",
    [
        shard_pb2.SearchRequest(route=route(EVERY), embedding=[0.1] * 256, k=5),
        shard_pb2.SearchRequest(route=route(EVERY), user_id=WHALE, embedding=[0.1] * 256, k=5),
        shard_pb2.SearchRequest(route=route((0, 4095), (5000, HALF - 1)), words="fox", k=5),
    ],
)
async def test_no_row_is_compared_with_every_slot(spread: LocalCluster, request_: Any) -> None:
    """The planner takes thousands of slots for a handful, and a join with them for cheap, until it has statistics."""
    async with database(spread.shard_dsn("shard-0")) as connection:
        await register_vector(connection)
        explaining: Any = Explaining(connection)
        found = await reads.search(explaining, IDENTITY, request_)
    assert len(found.results) == 5
    plan = explaining.plan
    assert "memories" in plan
    assert not any(join in plan for join in ("Semi Join", "SubPlan")), plan


async def check_plan(cluster: LocalCluster, request_: Any, index: str) -> None:
    async with database(cluster.shard_dsn("shard-0")) as connection:
        explaining: Any = Explaining(connection)
        if isinstance(request_, shard_pb2.SearchRequest):
            await reads.search(explaining, IDENTITY, request_)
        elif isinstance(request_, shard_pb2.ListRequest):
            await reads.list_page(explaining, request_, 1_000_000)
        else:
            await reads.get(explaining, request_.route.ranges, request_.id, request_.user_id, include_embedding=False)
    assert index in explaining.plan
    # Not every row is looked at; the slots that are owned may be, there are 16,384 at most.
    assert "Seq Scan on memories" not in explaining.plan
