"""Moving slots where a user's memories are in many of them: claims, request ids, tombstones and erasures go along."""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from common.moves import Step
from common.probe_user import PREFIX as PROBE
from common.slots import slot_of
from memshard.v1 import memory_pb2 as pb
from tests.integration.conftest import Somewhere
from tests.integration.test_everywhere import contents, new_id, store_some, update_request
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.moving import Slots
from tests.support.wire import memory_service


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
