"""A thousand callers who leave in the middle of their calls: their work stops, and nothing of it is left over."""

import asyncio
import random
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from local.cluster import REDIS
from local.postgres import SUPERUSER
from memshard.v1 import memory_pb2 as pb
from tests.faults.conftest import Record
from tests.support.counted_router import SOCKET, counts
from tests.support.eventually import eventually
from tests.support.faulty import FaultyCluster, faulty_cluster
from tests.support.wire import database, memory_service, store_request

SHARD = "shard-0"
_EMBEDDING = [1.0] + [0.0] * 15
# Fewer than the limit of calls in flight to a new shard, so that none is refused.
_AT_ONCE = 40
_STOPS_WITHIN_S = 2.0
# The most that a router keeps (router/location.py), and those on which it listens and asks for leases.
_REDIS_POOL = 64 + 4

# Lists, and not what the health monitors ask for at the time.
_WAITING = """
SELECT count(*) FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND datname = current_database() AND query LIKE '%(create_time, id) < %'
"""
_BUSY = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND state <> 'idle' AND usename = 'memshard_app'
"""


async def leave(faulty: FaultyCluster, users: list[str], callers: int, chance: random.Random) -> None:
    """Calls of all kinds at once, given up after a moment: by cancelling, or by the end of the whole connection."""
    async with memory_service(faulty.address) as api:
        calls: list[grpc.aio.UnaryUnaryCall[Any, Any]] = []
        for _ in range(callers):
            user = chance.choice(users)
            embedding = [chance.random() for _ in range(16)]
            match chance.randrange(4):
                case 0:
                    calls.append(
                        api.StoreMemory(store_request(user, "leaving", str(uuid.uuid4()), embedding=embedding))
                    )
                case 1:
                    calls.append(api.ListMemories(pb.ListMemoriesRequest(user_id=user)))
                case 2:
                    calls.append(api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, embedding=embedding)))
                case _:  # All shards are asked.
                    calls.append(api.GetMemory(pb.GetMemoryRequest(id=str(uuid.uuid4()))))
        await asyncio.sleep(chance.uniform(0.0, 0.1))
        if chance.random() < 0.5:
            for call in calls:
                call.cancel()
    async with asyncio.timeout(20):
        await asyncio.gather(*calls, return_exceptions=True)


async def left_over(faulty: FaultyCluster, socket: Path) -> dict[str, int]:
    """What could leak: tasks of the router, sockets and files of router and shard, statements under way."""
    async with database(faulty.cluster.shard_dsn(SHARD)) as connection:
        busy = int(await connection.fetchval(_BUSY)) - 1  # Without the one that asks.
    shard = psutil.Process(faulty.cluster.pid(SHARD))
    # Connections to Redis are kept, and become more until their pool is full, however few callers leave at once.
    redis_port = int(faulty.proxies.addresses[REDIS].rpartition(":")[2])
    to_redis = [one for one in faulty.router.net_connections() if one.raddr and one.raddr.port == redis_port]
    assert len(to_redis) <= _REDIS_POOL
    return {
        "tasks": (await counts(socket)).total(),
        "router's files": faulty.router.num_fds() - len(to_redis),
        "shard's files": shard.num_fds(),
        "statements": busy,
    }


async def stopped_reads(faulty: FaultyCluster, users: list[str]) -> float:
    """Reads that hang in the database, whose callers leave: seconds until no statement waits any more."""
    plan = faulty.cluster.plan()
    server = plan.shard_servers(SHARD)[faulty.cluster.primary(SHARD)]
    async with (
        database(server.dsn(SUPERUSER, plan.secrets.postgres)) as holder,
        database(faulty.cluster.shard_dsn(SHARD)) as observer,
    ):
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("LOCK TABLE memories IN ACCESS EXCLUSIVE MODE", timeout=20)
        async with memory_service(faulty.address) as api:
            calls = [
                asyncio.ensure_future(api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=60))
                for user in users
            ]

            async def all_wait() -> bool:
                return bool(await observer.fetchval(_WAITING) >= min(len(users), 10))

            await eventually(all_wait)
        began = time.monotonic()

        async def none_waits() -> bool:
            return bool(await observer.fetchval(_WAITING) == 0)

        await eventually(none_waits, within_s=30)
        took_s = time.monotonic() - began
        await asyncio.gather(*calls, return_exceptions=True)
        await transaction.rollback()
    return took_s


async def scenario(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, callers: int) -> None:
    socket = tmp_path / "counts"
    monkeypatch.setenv(SOCKET, str(socket))
    async with faulty_cluster(shards=2, router_module="tests.support.counted_router") as faulty:
        users = faulty.users(SHARD, 10)
        chance = random.Random(0)
        # As many at once as there will be, so that all connections are there that are kept: a pool grows to its most.
        await leave(faulty, users, _AT_ONCE, chance)
        await stopped_reads(faulty, users * 4)
        before = await settled(faulty, socket)
        began = time.monotonic()
        for _ in range(callers // _AT_ONCE):
            await leave(faulty, users, _AT_ONCE, chance)
        left_s = time.monotonic() - began
        stops_s = await stopped_reads(faulty, users * 4)
        try:
            after = await eventually(lambda: _no_more(faulty, socket, before), within_s=20)
        except AssertionError as error:
            raise AssertionError(f"{before}, then {await left_over(faulty, socket)}: {await counts(socket)}") from error
        async with memory_service(faulty.address) as api:
            began = time.monotonic()
            # More than the pool of a shard has connections: a slot that had leaked would be missed.
            await asyncio.gather(
                *(api.ListMemories(pb.ListMemoriesRequest(user_id=user), timeout=5) for user in users * 4)
            )
            works_s = time.monotonic() - began
        names = await counts(socket)
    record(
        "1,000 callers disconnect",
        "their work stops; no leaked tasks, connections or pool slots",
        f"reads that hung in the database stopped {stops_s:.2f} s after their callers had gone; before and after: "
        + ", ".join(f"{name} {before[name]} → {after[name]}" for name in before)
        + f"; {len(users) * 4} calls at once then took {works_s:.2f} s",
    )
    print(f"they left within {left_s:.1f} s; {dict(names)}")
    assert stops_s < _STOPS_WITHIN_S


async def settled(faulty: FaultyCluster, socket: Path) -> dict[str, int]:
    """What is there once nothing is under way: the same twice, a second apart."""
    seen: list[dict[str, int]] = []

    async def same() -> dict[str, int]:
        seen.append(await left_over(faulty, socket))
        await asyncio.sleep(1)
        again = await left_over(faulty, socket)
        return again if again == seen[-1] and again["statements"] == 0 else {}

    return await eventually(same, within_s=30)


async def _no_more(faulty: FaultyCluster, socket: Path, before: dict[str, int]) -> dict[str, int]:
    now = await left_over(faulty, socket)
    # Looks at health come and go: a few tasks, and a connection to a database more or less.
    room = Counter({"tasks": 5, "router's files": 5, "shard's files": 5})
    return now if all(now[name] <= before[name] + room[name] for name in before) else {}


@pytest.mark.timeout(240)
async def test_nothing_is_left_over_of_callers_who_left(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scenario(record, tmp_path, monkeypatch, callers=200)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_is_left_over_of_a_thousand_callers_who_left(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scenario(record, tmp_path, monkeypatch, callers=1000)
