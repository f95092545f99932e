"""What routers remember of slots that move, and come back: nobody who shows a token is answered with less.

Whoever writes meanwhile is not heard by the others, as when its messages are lost: what they remember is refused by its
stamp, or not at all.
"""

from typing import TYPE_CHECKING

from redis.asyncio import Redis

from local.cluster import REDIS
from memshard.v1 import memory_pb2 as pb
from tests.integration.test_cached_memories import got, remembered, session, update_of
from tests.integration.test_cached_searches import found
from tests.support.cluster import PATIENT_WITH_REDIS, LocalCluster
from tests.support.eventually import eventually
from tests.support.faulty import FaultyCluster, faulty_cluster
from tests.support.moving import Slots
from tests.support.proxy import Fault
from tests.support.wire import memory_service, store_request, user_slot

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

# What each memory is for: who reads it next after it was remembered, and when.
_HERE_MOVED, _HERE_RETURNED, _REDIS_MOVED, _REDIS_RETURNED, _SHOWN = range(5)
_QUERIES = ("green tea", "black coffee")


async def _in_redis(cluster: LocalCluster) -> int:
    """How many memories Redis has."""
    redis = Redis.from_url(cluster.redis_url())
    try:
        return len([key async for key in redis.scan_iter(match="mem:*")])
    finally:
        await redis.aclose()


async def _rewritten(api: "MemoryServiceAsyncStub", memories: list[pb.Memory], content: str) -> bytes:
    """Changes all of them; the token of the last change."""
    token = b""
    for number, memory in enumerate(memories):
        changed = await api.UpdateMemory(update_of(memory, f"{content} {number}"))
        token = changed.receipt.consistency_token
    return token


def _contents(memories: list[pb.Memory], content: str) -> set[str]:
    return {f"{content} {number}" for number in range(len(memories))}


async def test_nothing_of_before_a_move_is_answered_to_a_session_that_wrote_after_it(user: str) -> None:
    """Neither while the slot is away nor when it is back, neither from a router's memory nor from Redis."""
    async with faulty_cluster(routers=2, embedder="local", dimensions=256, environment=PATIENT_WITH_REDIS) as faulty:
        await _walk(faulty, faulty.users("shard-0", 1, prefix=user)[0])


async def _walk(faulty: FaultyCluster, user: str) -> None:
    slots, slot = Slots(faulty.cluster, {"rollback_window_s": 0}), str(user_slot(user))
    host, port = faulty.cluster.address.split(":")
    async with (
        memory_service(faulty.cluster.address) as here,
        memory_service(f"{host}:{int(port) + 1}") as by_redis,
        memory_service(faulty.address) as unheard,
    ):
        memories = [(await here.StoreMemory(store_request(user, f"tea {n}"))).memory for n in range(_SHOWN + 1)]
        first = _contents(memories, "tea")
        for number, memory in enumerate(memories):
            await remembered(here, memory, f"tea {number}")

        async def all_found() -> bool:
            return [await found(here, user, session(), query=query) for query in _QUERIES] == [(first, ["cache"])] * 2

        await eventually(all_found)

        async def all_there() -> bool:
            return await _in_redis(faulty.cluster) == len(memories)

        await eventually(all_there)
        assert await got(by_redis, memories[_SHOWN], session()) == (f"tea {_SHOWN}", ["cache"])
        await faulty.proxies.inflict(Fault.RESET, REDIS)

        await slots.move("move", "--first", slot, "--last", slot, "--to", "shard-1")
        read = session(await _rewritten(unheard, memories, "coffee"))
        for api, number in ((here, _HERE_MOVED), (by_redis, _REDIS_MOVED)):
            assert (await got(api, memories[number], read))[0] == f"coffee {number}"
        assert (await found(here, user, read, query=_QUERIES[0]))[0] == _contents(memories, "coffee")

        await slots.move("move", "--first", slot, "--last", slot, "--to", "shard-0")
        for api, number in ((here, _HERE_RETURNED), (by_redis, _REDIS_RETURNED)):
            assert (await got(api, memories[number], read))[0] == f"coffee {number}"
        assert (await found(here, user, read, query=_QUERIES[1]))[0] == _contents(memories, "coffee")

        read = session(await _rewritten(unheard, memories, "water"))
        for api, number in ((here, _HERE_MOVED), (by_redis, _REDIS_MOVED)):
            assert (await got(api, memories[number], read))[0] == f"water {number}"
        assert (await found(here, user, read, query=_QUERIES[0]))[0] == _contents(memories, "water")
