"""Large users have an index of their own: made in the background, as good as an exact search, and moved along."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from pgvector import HalfVector
from pgvector.asyncpg import register_vector

from common.catalog import PlacementStrategy, Precision
from common.slots import slot_of
from common.telemetry.registry import REGISTRY
from local.postgres import SUPERUSER
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from shard import identity, reads
from shard.identity import Identity
from shard.large_users import indexes, recall
from shard.large_users.plan import Bounds
from shard.schema import INDEX_SETTINGS, NEAREST_IN_INDEX
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.metrics import families_of
from tests.support.moving import Slots
from tests.support.wire import database, memory_service, pool_of_one, store_request

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

DIMENSIONS = 32
# Of so many independent directions, like texts; without any structure no index finds anything.
_INNER = 8
_THRESHOLD = 2000
# Everything that a name may have in it and a statement or an index's name should not see.
WHALE = "o'brien \"; DROP TABLE memories; -- %s \\ $1 \N{WHALE}"
SIZES = {WHALE: 6000, "second": 4000, "middling": 1000, "few": 20, "one": 1}
_BATCH = 500
_QUERIES = 40
_BUILT_WITHIN_S = 60.0

Vectors = npt.NDArray[np.float32]

_INDEXES = """
SELECT relname, pg_index.indexrelid AS oid, indisvalid, own_indexes.* FROM pg_index
JOIN pg_class ON pg_class.oid = indexrelid LEFT JOIN own_indexes ON name = relname
WHERE indrelid = 'memories'::regclass AND relname LIKE 'memories\\_own\\_%'
"""
_OF_USER = "user_hash = sha256(convert_to($1::text, 'UTF8'))"
_BUILDER = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY%' AND state = 'active'"
_WAITS = "SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting for%'"


def structured(seed: int, count: int) -> Vectors:
    """Embeddings in which there is something to find."""
    directions = np.random.default_rng(1).standard_normal((_INNER, DIMENSIONS))
    random = np.random.default_rng((2, seed))
    noise = 0.05 * random.standard_normal((count, DIMENSIONS))
    return (random.standard_normal((count, _INNER)) @ directions + noise).astype(np.float32)


@dataclass
class Sea:
    """A cluster in which two users are large, and its API."""

    cluster: LocalCluster
    slots: Slots
    api: "MemoryServiceAsyncStub"
    vectors: Mapping[str, Vectors]

    async def owner(self, user: str) -> str:
        return (await self.slots.topology()).owner(slot_of(user.encode())).shard_id

    async def store(self, user: str, vectors: Vectors) -> None:
        for first in range(0, len(vectors), _BATCH):
            memories = [
                store_request(
                    user,
                    f"memory {number}",
                    embedding=vector.tolist(),
                    type=1 + number % 2,
                    metadata={"number": number, "of": number % 100},
                ).memory
                for number, vector in enumerate(vectors[first : first + _BATCH], first)
            ]
            answer = await self.api.BatchStoreMemories(pb.BatchStoreMemoriesRequest(memories=memories))
            assert all(result.id for result in answer.results)

    async def search(
        self, user: str, query: Vectors, k: int, filter: pb.Filter | None = None, **fields: Any
    ) -> list[pb.Memory]:
        """The memories found, best first."""
        response = await self.api.SearchMemories(
            pb.SearchMemoriesRequest(user_id=user, embedding=query.tolist(), limit=k, filter=filter, **fields)
        )
        assert all(result.memory.user_id == user for result in response.results)
        return [result.memory for result in response.results]

    def nearest(self, user: str, query: Vectors, k: int, of: int | None = None) -> list[int]:
        """The same by looking at all of them."""
        vectors = self.vectors[user].astype(np.float16).astype(np.float64)
        scores = vectors @ query / np.linalg.norm(vectors, axis=1)
        ranked = [int(n) for n in np.argsort(-scores) if of is None or n % 100 == of]
        return ranked[:k]

    async def recall(self, user: str, k: int, of: int | None = None, **fields: Any) -> float:
        """Over some queries; each has min(k, rows) results."""
        filter = None if of is None else is_of(of)
        shares = []
        for query in structured(99, _QUERIES):
            found = numbers(await self.search(user, query, k, filter, **fields))
            wanted = self.nearest(user, query, k, of)
            assert len(found) == len(wanted), (k, of)
            shares.append(len(set(found) & set(wanted)) / len(wanted))
        return float(np.mean(shares))

    async def indexes(self, user: str, shard_id: str = "") -> list[asyncpg.Record]:
        async with database(self.cluster.shard_dsn(shard_id or await self.owner(user), owner=True)) as connection:
            return await connection.fetch(f"{_INDEXES} AND {_OF_USER}", user)

    async def proven(self, user: str, shard_id: str = "") -> asyncpg.Record:
        """The one index of a user, once it is there and known to be good."""
        (index,) = await self.indexes(user, shard_id)
        assert index["indisvalid"]
        assert index["ef_few"]
        assert index["ef_many"]
        return index

    async def answered(self, how: str) -> float:
        """Searches of users with an index of their own, by all shards and replicas."""
        ports = self.cluster.plan().record.ports
        services = [name.removesuffix("-metrics") for name in ports if "shard" in name and name.endswith("-metrics")]
        total = 0.0
        for service in services:
            family = (await families_of(self.cluster, service))["memory_own_index_searches"]
            total += sum(s.value for s in family.samples if s.name.endswith("_total") and s.labels == {"answered": how})
        return total

    async def known(self) -> None:
        """Returns once every server of the whale's shard goes by its index."""

        async def by_all() -> bool:
            before = await self.answered("exact")
            for query in structured(98, 10):
                await self.search(WHALE, query, 1)
            return await self.answered("exact") == before

        await eventually(by_all, within_s=20)


def numbers(memories: list[pb.Memory]) -> list[int]:
    """By which the test knows them."""
    return [int(memory.metadata["number"]) for memory in memories]  # type: ignore[arg-type]


def is_of(of: int) -> pb.Filter:
    comparison = pb.Comparison(field="metadata.of", operator=pb.OPERATOR_EQ)
    comparison.value.number_value = of
    return pb.Filter(comparison=comparison)


def half_of_them() -> pb.Filter:
    """Those with an even number."""
    half = pb.Filter(comparison=pb.Comparison(field="type", operator=pb.OPERATOR_EQ))
    half.comparison.value.string_value = "EPISODIC"
    return half


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sea() -> AsyncIterator[Sea]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MEMORIES": _THRESHOLD, "MOST": 2, "INTERVAL_S": 1}.items():
            patch.setenv(f"MEMSHARD_SHARD_OWN_INDEX_{name}", str(value))
        async with (
            LocalCluster(shards=2, replicas=1, embedder="none", dimensions=DIMENSIONS) as cluster,
            memory_service(cluster.address) as api,
        ):
            # However busy the machine is: which level is in force is part of what is tested.
            await cluster.run("degrade", "normal")
            vectors = {user: structured(seed, size) for seed, (user, size) in enumerate(SIZES.items())}
            sea = Sea(cluster, Slots(cluster, {"rollback_window_s": 0}), api, vectors)
            for user, some in vectors.items():
                await sea.store(user, some)
            for user in (WHALE, "second"):
                await eventually(lambda user=user: sea.proven(user), within_s=_BUILT_WITHIN_S)  # type: ignore[misc]
            await sea.known()
            yield sea


async def test_users_of_all_sizes_get_all_results_that_there_are_and_the_right_ones(sea: Sea) -> None:
    for user, size in SIZES.items():
        for k in (1, 10, 100):
            # Of so few questions for one memory each, one that goes wrong is more than a hundredth.
            assert await sea.recall(user, k) >= (0.99 if k > 1 else 1 - 1.5 / _QUERIES), (size, k)
    for user in ("middling", "few", "one"):
        assert await sea.indexes(user) == []


async def test_searches_of_a_large_user_go_by_the_index_on_replicas_and_on_the_primary(sea: Sea) -> None:
    for level in (pb.READ_LEVEL_STRONG, pb.READ_LEVEL_EVENTUAL):
        index, exact = await sea.answered("index"), await sea.answered("exact")
        for query in structured(5, 20):
            await sea.search(WHALE, query, 10, read=pb.ReadOptions(level=level))
        assert await sea.answered("index") >= index + 20
        assert await sea.answered("exact") == exact


async def test_nothing_in_the_catalog_has_the_users_name(sea: Sea) -> None:
    async with database(sea.cluster.shard_dsn(await sea.owner(WHALE), owner=True)) as connection:
        index = (await sea.indexes(WHALE))[0]
        text = await connection.fetchval("SELECT pg_get_indexdef($1)", index["oid"])
        assert "hnsw" in text
        assert str(index["key"]) in text
        assert "brien" not in f"{text} {[dict(one) for one in await connection.fetch(_INDEXES)]}"


@asynccontextmanager
async def as_the_service(sea: Sea) -> AsyncIterator[tuple[Any, Identity]]:
    """A connection that the service of the whale's shard could have, and who that is."""
    async with pool_of_one(sea.cluster.shard_dsn(await sea.owner(WHALE))) as pool, pool.acquire() as connection:
        await register_vector(connection)  # type: ignore[arg-type]  # What a pool lends will do.
        known = await identity.read(connection)
        assert known is not None
        yield connection, known


def asked(ranges: list[tuple[int, int]], query: Vectors) -> shard_pb2.SearchRequest:
    """A search of the whale's as a router sends it."""
    route = shard_pb2.Route(ranges=[shard_pb2.SlotRange(first=first, last=last) for first, last in ranges])
    return shard_pb2.SearchRequest(route=route, user_id=WHALE, embedding=query.tolist(), k=10)


async def test_a_search_by_the_index_uses_it_every_time_and_an_exact_one_never(sea: Sea) -> None:
    """After some runs PostgreSQL prefers a plan for everybody, which can use no user's own index."""
    index, shard_id, slot = await sea.proven(WHALE), await sea.owner(WHALE), slot_of(WHALE.encode())
    everywhere = [(r.first, r.last) for r in (await sea.slots.topology()).ranges if r.shard_id == shard_id]
    # Of this connection since what it had counted was last given to the server, which is never within a transaction.
    scans = "SELECT pg_stat_get_xact_numscans($1)"
    async with as_the_service(sea) as (connection, known):
        for ranges in ([(slot, slot)], everywhere):
            # The service measures the index meanwhile: what counts is what this transaction does.
            async with connection.transaction():
                before = await connection.fetchval(scans, index["oid"])
                for query in structured(8, 20):
                    found = await reads.search_index(
                        connection, known, asked(ranges, query), index["key"], candidates=10, effort=200
                    )
                    assert found is not None
                    exact = await reads.search(connection, known, asked(ranges, query))
                    nearest = {result.memory.id for result in exact.results}
                    assert len(nearest & {result.memory.id for result in found.results}) >= 9
                # Every search by the index, and no exact one.
                assert await connection.fetchval(scans, index["oid"]) == before + 20


async def test_what_a_search_by_the_index_sets_ends_with_it(sea: Sea) -> None:
    index, slot = await sea.proven(WHALE), slot_of(WHALE.encode())
    async with as_the_service(sea) as (connection, known):
        settings = ("plan_cache_mode", "enable_sort", "jit", "hnsw.ef_search", "hnsw.iterative_scan")
        await connection.fetch("SELECT '[1]'::vector")  # It has the last two.
        before = [await connection.fetchval("SELECT current_setting($1)", name) for name in settings]
        await reads.search_index(
            connection, known, asked([(slot, slot)], structured(8, 1)[0]), index["key"], candidates=10, effort=77
        )
        assert [await connection.fetchval("SELECT current_setting($1)", name) for name in settings] == before


async def test_the_plan_goes_by_the_index_when_statistics_know_nothing_of_the_user(sea: Sea) -> None:
    index = await sea.proven(WHALE)
    async with database(sea.cluster.shard_dsn(await sea.owner(WHALE), owner=True)) as connection:
        await connection.execute("SELECT pg_clear_attribute_stats('public', 'memories', 'user_id', false)")
    statement = NEAREST_IN_INDEX
    for number, name in enumerate(("for_user", "for_key", "query", "candidates"), 1):
        statement = statement.replace(name, f"${number}")
    values = (WHALE, index["key"], HalfVector(structured(3, 1)[0]), 10)
    async with as_the_service(sea) as (connection, _), connection.transaction():
        for name, value in INDEX_SETTINGS.items():
            await connection.execute("SELECT set_config($1, $2, true)", name, value)
        plan = "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {statement}", *values))
    assert f"Index Scan using {index['relname']} on memories" in plan
    assert "Order By: (embedding <=>" in plan


async def test_filters_are_exact_whatever_share_of_the_memories_passes_them(sea: Sea) -> None:
    before = await sea.answered("exact")
    assert await sea.recall(WHALE, 10, of=7) >= 0.99
    assert await sea.answered("exact") > before, "a filter that lets few pass is not left to the index"
    only = pb.Filter(comparison=pb.Comparison(field="metadata.number", operator=pb.OPERATOR_EQ))
    only.comparison.value.number_value = 4321
    assert numbers(await sea.search(WHALE, structured(3, 1)[0], 10, only)) == [4321]
    # Half of them pass: those are found among the nearest.
    before = await sea.answered("index")
    for query in structured(97, _QUERIES):
        wanted = [n for n in sea.nearest(WHALE, query, 100) if n % 2 == 0][:10]
        found = numbers(await sea.search(WHALE, query, 10, half_of_them()))
        assert len(set(found) & set(wanted)) >= 9
    assert await sea.answered("index") > before


async def test_a_score_that_is_asked_for_leaves_out_the_others_and_no_more(sea: Sea) -> None:
    query = structured(3, 1)[0]
    request = pb.SearchMemoriesRequest(user_id=WHALE, embedding=query.tolist(), limit=10)
    results = (await sea.api.SearchMemories(request)).results
    request.min_score = results[4].score
    assert [one.memory.id for one in (await sea.api.SearchMemories(request)).results] == [
        one.memory.id for one in results[:5]
    ]


@pytest.mark.parametrize("level", ["reduced", "essential"])
async def test_levels_that_answer_to_load_go_by_an_index_that_is_not_proven(sea: Sea, level: str) -> None:
    index = await sea.proven(WHALE)
    async with database(sea.cluster.shard_dsn(await sea.owner(WHALE), owner=True)) as connection:
        await connection.execute("UPDATE own_indexes SET ef_few = NULL, ef_many = NULL WHERE key = $1", index["key"])

        async def went(how: str) -> bool:
            before = await sea.answered(how)
            assert len(await sea.search(WHALE, structured(4, 1)[0], 10, half_of_them())) == 10
            return await sea.answered(how) > before

        await eventually(lambda: went("exact"), within_s=10)
        await sea.cluster.run("degrade", level)
        try:
            await eventually(lambda: went("index"), within_s=10)
            assert await sea.recall(WHALE, 100) >= 0.9
            # A filter that few pass is left to an exact search all the same, so that all results are there.
            assert await sea.recall(WHALE, 10, of=3) >= 0.99
        finally:
            await sea.cluster.run("degrade", "normal")
            await connection.execute(
                "UPDATE own_indexes SET ef_few = $2, ef_many = $3 WHERE key = $1",
                index["key"],
                index["ef_few"],
                index["ef_many"],
            )
    await sea.known()


async def test_writes_and_searches_go_on_while_an_index_is_made_and_one_whose_maker_died_is_made_anew(sea: Sea) -> None:
    shard_id = await sea.owner(WHALE)
    plan = sea.cluster.plan()
    server = plan.shard_servers(shard_id)[sea.cluster.primary(shard_id)]
    async with (
        database(sea.cluster.shard_dsn(shard_id, owner=True)) as connection,
        database(server.dsn(SUPERUSER, plan.secrets.postgres)) as superuser,
        database(sea.cluster.shard_dsn(shard_id)) as blocker,
    ):
        old = await sea.proven(WHALE)
        await connection.execute(f'DROP INDEX CONCURRENTLY "{old["relname"]}"')
        # Whoever makes an index waits for a transaction that has written.
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("UPDATE memories SET importance = importance WHERE user_id = 'nobody'")
        try:
            maker = await eventually(lambda: superuser.fetchval(_BUILDER), within_s=20)
            await eventually(lambda: superuser.fetchval(_WAITS), within_s=20)
            async with asyncio.timeout(5):
                memory = str(uuid.uuid4())
                stored = await sea.api.StoreMemory(
                    store_request(WHALE, "meanwhile", memory, embedding=structured(77, 1)[0].tolist())
                )
                strong = pb.ReadOptions(level=pb.READ_LEVEL_STRONG)
                found = await sea.search(WHALE, structured(77, 1)[0], 10, read=strong)
                assert [found[0].id, len(found)] == [stored.memory.id, 10]
                await sea.api.DeleteMemory(pb.DeleteMemoryRequest(user_id=WHALE, id=memory))
            assert await superuser.fetchval("SELECT pg_terminate_backend($1)", maker)
        finally:
            await transaction.rollback()
        new = await eventually(lambda: sea.proven(WHALE), within_s=_BUILT_WITHIN_S)
        assert new["oid"] != old["oid"]
    await sea.known()
    assert await sea.recall(WHALE, 10) >= 0.99


def built(outcome: str) -> float:
    count = REGISTRY.get_sample_value("memory_own_index_builds_total", {"outcome": outcome})
    assert count is not None, "a counter that is not there from the beginning hides its first increase"
    return count


async def test_a_build_that_fails_is_counted_and_one_that_is_given_up_is_not(sea: Sea) -> None:
    shard_id = await sea.owner("middling")
    plan = sea.cluster.plan()
    server = plan.shard_servers(shard_id)[sea.cluster.primary(shard_id)]
    async with (
        database(sea.cluster.shard_dsn(shard_id, owner=True)) as connection,
        database(server.dsn(SUPERUSER, plan.secrets.postgres)) as superuser,
        database(sea.cluster.shard_dsn(shard_id)) as blocker,
        indexes.alone(connection, patience_s=30) as had,
    ):
        assert had
        await register_vector(connection)
        known = await identity.read(connection)
        assert known is not None
        users = await indexes.large_users(connection, known, Bounds(SIZES["middling"], 9))
        (user,) = (user for user in users if user.user_id == "middling")
        made, failed = built("made"), built("failed")
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("UPDATE memories SET importance = importance WHERE user_id = 'nobody'")
        try:
            given_up = asyncio.create_task(indexes.build(connection, known, user, memory_mb=16))
            await eventually(lambda: superuser.fetchval(_WAITS), within_s=20)
            given_up.cancel()
            await asyncio.wait([given_up])
            assert given_up.cancelled()
        finally:
            await transaction.rollback()
        assert (built("made"), built("failed")) == (made, failed)
        await indexes.tidy(connection)
        # Of embeddings that are not of this precision.
        assert known.precision is Precision.HALF
        with pytest.raises(asyncpg.PostgresError):
            await indexes.build(connection, replace(known, precision=Precision.SINGLE), user, memory_mb=16)
        assert (built("made"), built("failed")) == (made, failed + 1)
        await indexes.tidy(connection)


async def test_no_log_has_what_an_index_is_called(sea: Sea) -> None:
    """Its name has a hash that whoever guesses a user's name can make as well."""
    (index,) = await sea.indexes(WHALE)
    lines = [json.loads(line) for file in sea.cluster.layout.logs.glob("shard-*.log*") for line in _of_shards(file)]
    made = [line["index"] for line in lines if line["event"] == "made"]
    assert index["oid"] in made
    assert index["relname"].removeprefix("memories_own_") not in str(lines)


def _of_shards(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]


async def test_a_user_in_many_slots_is_counted_and_measured_as_one(sea: Sea) -> None:
    """As with the placements that spread users."""
    async with database(sea.cluster.shard_dsn(await sea.owner(WHALE), owner=True)) as connection:
        await register_vector(connection)
        known = await identity.read(connection)
        assert known is not None
        spread = replace(known, placement=PlacementStrategy.CONTENT_HASH)
        users = await indexes.large_users(connection, spread, Bounds(_THRESHOLD, 2))
        (whale,) = (user for user in users if user.user_id == WHALE)
        assert (whale.slot, whale.rows) == (None, SIZES[WHALE])
        assert (await recall.measure(connection, spread, whale)).ef_many


async def test_a_moved_users_index_is_there_before_the_user_is_and_goes_from_where_the_user_was(sea: Sea) -> None:
    source, slot = await sea.owner(WHALE), slot_of(WHALE.encode())
    target = "shard-1" if source == "shard-0" else "shard-0"
    events = await sea.slots.move("move", "--first", str(slot), "--last", str(slot), "--to", target)
    (told,) = [event for event in events if event.get("indexes")]
    assert (told["indexes"], told["step"]) == (1, "copying")
    assert await sea.owner(WHALE) == target
    await sea.proven(WHALE, target)
    await sea.known()
    assert await sea.recall(WHALE, 10) >= 0.99

    async def gone() -> bool:
        return await sea.indexes(WHALE, source) == []

    await eventually(gone, within_s=20)


async def test_an_erased_users_index_is_dropped(sea: Sea) -> None:
    async def gone() -> bool:
        async with database(sea.cluster.shard_dsn(await sea.owner("second"), owner=True)) as connection:
            recorded = await connection.fetchval(f"SELECT count(*) FROM own_indexes WHERE {_OF_USER}", "second")
        return not recorded and await sea.indexes("second") == []

    assert not await gone()
    await sea.api.EraseUser(pb.EraseUserRequest(user_id="second", request_id=str(uuid.uuid4())))
    await eventually(gone, within_s=20)
