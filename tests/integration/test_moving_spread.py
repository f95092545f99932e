"""Moving slots where a user's memories are in many of them: claims, request ids, tombstones and erasures go along."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from common.moves import Step
from common.probe_user import PREFIX as PROBE
from common.slots import slot_of
from memshard.v1 import memory_pb2 as pb
from shard.moving.tables import MOVED
from tests.integration.conftest import Somewhere
from tests.integration.test_everywhere import contents, new_id, store_some, update_request
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import memory_service, store_request

_EACH = 16


def at_home(shard: int, user: str) -> str:
    """A name like the user's, whose own slot one of the two shards has to begin with."""
    names = (f"{user}-{number}" for number in itertools.count())
    return next(name for name in names if slot_of(name.encode()) // 8192 == shard)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def there() -> AsyncIterator[Somewhere]:
    options = ["--placement", "content_hash"]
    async with LocalCluster(shards=2, options=options) as cluster, memory_service(cluster.address) as api:
        yield Somewhere(cluster, "content_hash", api)


@pytest.fixture
def slots(there: Somewhere) -> Slots:
    return Slots(there.cluster, {"rollback_window_s": 0, "max_slots": 16384})


async def moved(slots: Slots, first: int, last: int, target: str) -> None:
    await slots.move("move", "--first", str(first), "--last", str(last), "--to", target)
    assert (await slots.moves())[-1].step is Step.DONE


async def erase(there: Somewhere, user: str, request_id: str) -> tuple[int, int]:
    answer = await there.api.EraseUser(pb.EraseUserRequest(user_id=user, request_id=request_id))
    return answer.memories_erased, answer.versions_erased


async def test_a_request_to_erase_has_one_effect_wherever_slots_went_meanwhile(
    there: Somewhere, slots: Slots, user: str
) -> None:
    """The first slots that a shard has are others then, with what another shard has to say of the request."""
    stored = await store_some(there, user, 24)
    await there.api.UpdateMemory(update_request(stored[0], "content", content="changed"))
    totals = await erase(there, user, "once")
    assert totals == (24, 1)
    since = sorted(memory.content for memory in await store_some(there, user, 24))
    await moved(slots, 0, 0, "shard-1")
    try:
        assert await erase(there, user, "once") == totals
        assert sorted(await contents(there, user)) == since
        assert await erase(there, user, "another") == (24, 0)
        assert await contents(there, user) == []
    finally:
        await moved(slots, 0, 0, "shard-0")


async def test_a_request_to_erase_that_one_shard_missed_ends_on_all_wherever_slots_went_meanwhile(
    there: Somewhere, slots: Slots, user: str
) -> None:
    """A slot of the shard that was done comes to the one that was not, and its memories are counted once."""
    user = at_home(0, user)
    await store_some(there, user, 24)

    async def is_refused() -> bool:
        try:
            await erase(there, f"{user}-other", new_id())
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False

    await there.cluster.run("shards", "set", "shard-1", "--status", "maintenance")
    try:
        await eventually(is_refused)
        with pytest.raises(grpc.aio.AioRpcError):
            await erase(there, user, "once")
    finally:
        await there.cluster.run("shards", "set", "shard-1", "--status", "active")
    await moved(slots, 0, 0, "shard-1")
    try:

        async def is_done() -> bool:
            return not await is_refused()

        await eventually(is_done)
        assert await erase(there, user, "once") == (24, 0)
        assert await contents(there, user) == []
        rows = await users_rows(slots)
        assert not any(user in str(row) for tables in rows.values() for found in tables.values() for row in found)
        assert await erase(there, user, "once") == (24, 0)
    finally:
        await moved(slots, 0, 0, "shard-0")


async def users_rows(slots: Slots) -> dict[str, dict[str, set[tuple[Any, ...]]]]:
    """Every row that moves, but for what is written all the time to see whether it goes."""
    return {
        shard_id: {table: {row for row in rows if PROBE not in row[0]} for table, rows in tables.items()}
        for shard_id, tables in (await slots.rows()).items()
    }


async def all_rows(slots: Slots) -> dict[str, set[tuple[Any, ...]]]:
    """The same wherever they are."""
    found = list((await users_rows(slots)).values())
    return {table: set[tuple[Any, ...]]().union(*(tables[table] for tables in found)) for table in MOVED}


class Asked:
    """Requests of all kinds with ids of their callers', which are repeated, and what is read."""

    def __init__(self, there: Somewhere, user: str) -> None:
        self._there = there
        self._api = there.api
        self._user = user
        self._stores = [store_request(user, f"{user} remembers number {n}", str(uuid.uuid4())) for n in range(_EACH)]
        self._updated, self._deleted = self._stores[:4], self._stores[4:8]

    async def answers(self) -> dict[str, Any]:
        """What each is answered, in order; of errors their code. What makes anew what may be lost comes last."""
        found = await self._read()
        # The id of one request, for another.
        found["taken request ids"] = [
            await self._code(self._api.DeleteMemory(self._deletion(store.memory.id, self._updated[0].memory.id)))
            for store in self._stores[8:10]
        ]
        found["taken ids"] = [
            await self._code(self._api.StoreMemory(store_request(self._user, "other content", store.memory.id)))
            for store in self._stores
        ]
        return found | await self.repeat()

    async def repeat(self) -> dict[str, Any]:
        """Makes the requests, for the first time or again."""
        return {
            "stored": await asyncio.gather(*(self._code(self._api.StoreMemory(store)) for store in self._stores)),
            "updated": [await self._update(store.memory.id) for store in self._updated],
            "deleted": [await self._delete(store.memory.id) for store in self._deleted],
            "erased": await erase(self._there, f"{self._user}-erased", "once"),
        }

    async def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for whose in (self._user, ""):
            found[f"got as {whose!r}"] = [await self._got(store.memory.id, whose) for store in self._stores]
        found["listed"] = sorted(await contents(self._there, self._user))
        found["versions"] = [await self._versions(store.memory.id) for store in self._stores]
        search = pb.SearchMemoriesRequest(user_id=self._user, query="number", limit=100)
        found["found"] = [(r.memory.id, r.score) for r in (await self._api.SearchMemories(search)).results]
        return found

    async def _update(self, memory_id: str) -> Any:
        request = update_request(pb.Memory(id=memory_id, user_id=self._user), "content", content=f"new {memory_id}")
        request.request_id = memory_id
        return (await self._api.UpdateMemory(request)).memory

    def _deletion(self, memory_id: str, request_id: str) -> pb.DeleteMemoryRequest:
        return pb.DeleteMemoryRequest(id=memory_id, user_id=self._user, request_id=request_id)

    async def _delete(self, memory_id: str) -> bool:
        return (await self._api.DeleteMemory(self._deletion(memory_id, memory_id))).deleted

    async def _got(self, memory_id: str, whose: str) -> Any:
        try:
            return (await self._api.GetMemory(pb.GetMemoryRequest(id=memory_id, user_id=whose))).memory
        except grpc.aio.AioRpcError as error:
            return error.code()

    async def _versions(self, memory_id: str) -> list[tuple[int, str]]:
        request = pb.ListMemoryVersionsRequest(id=memory_id, user_id=self._user)
        return [(found.version, found.content) for found in (await self._api.ListMemoryVersions(request)).versions]

    async def _code(self, call: Any) -> grpc.StatusCode:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_whatever_belongs_to_users_goes_there_and_back_with_their_slots(there: Somewhere, slots: Slots) -> None:
    users = [at_home(0, "spread"), at_home(1, "spread")]
    asked = [Asked(there, user) for user in users]
    for user in users:
        await store_some(there, f"{user}-erased", _EACH)
    first = [await one.repeat() for one in asked]
    expected = [await one.answers() for one in asked]
    for found, again in zip(first, expected, strict=True):
        assert (found["erased"], again["erased"]) == ((_EACH, 0), (_EACH, 0))
        assert (found["updated"], found["deleted"]) == (again["updated"], again["deleted"])
        assert set(again["taken ids"]) == {grpc.StatusCode.ALREADY_EXISTS}
        assert set(again["taken request ids"]) == {grpc.StatusCode.INVALID_ARGUMENT}
    # There is something of everything on both sides, so that each way takes something along.
    before = await users_rows(slots)
    for table in set(MOVED) - {"erasures", "erased_ids"}:
        assert all(before[shard_id][table] for shard_id in before), table
    for ranges, target in (
        (((0, 4095), (6000, 8191)), "shard-1"),
        (((0, 16383),), "shard-0"),
        (((8192, 16383),), "shard-1"),
    ):
        rows = await all_rows(slots)
        topology = await slots.topology()
        for low, high in ranges:
            for owned in topology.ranges:
                part = max(low, owned.first), min(high, owned.last)
                if part[0] <= part[1] and owned.shard_id != target:
                    await moved(slots, *part, target)
        assert await all_rows(slots) == rows
        assert await slots.left_over() == []
        assert [await one.answers() for one in asked] == expected
    assert {owned.shard_id for owned in (await slots.topology()).ranges} == {"shard-0", "shard-1"}
