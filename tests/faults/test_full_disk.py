"""A shard's disk is full: its users' writes are refused cleanly and its reads go on, and once there is room it goes on
by itself, with all that was acknowledged.
"""

import asyncio
import secrets
import time
from pathlib import Path

import grpc
import pytest

from tests.faults.conftest import Record
from tests.support import small_disk as disks
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually
from tests.support.generator import Plan, generating, result_file
from tests.support.small_disk import small_disk
from tests.support.wire import database, memory_service, reason_of, store_request, topology_of, user_slot

FULL = "shard-0"
# Refused: nobody was asked, or the database has said that it did not.
_REFUSED = ("UNAVAILABLE DATABASE_UNAVAILABLE", "UNAVAILABLE BREAKER_OPEN", "FAILED_PRECONDITION READ_ONLY")
_CLEAN = ("OK", "UNAVAILABLE ", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED OVERLOADED", *_REFUSED)

pytestmark = pytest.mark.skipif(bool(disks.why_not()), reason=disks.why_not())


async def scenario(record: Record, tmp_path: Path, *, full_s: float) -> None:
    async with LocalCluster(shards=2, embedder="none", dimensions=16) as cluster:
        await eventually(cluster.healthy, within_s=60)
        topology = await topology_of(cluster.catalog_dsn())
        users: dict[str, list[str]] = {shard.shard_id: [] for shard in topology.shards}
        for name in (f"user-{number}" for number in range(40)):
            users[topology.owner(user_slot(name)).shard_id].append(name)
        of_the_test = users[FULL].pop()
        async with small_disk(cluster, cluster.primary(FULL)) as disk:
            await eventually(cluster.healthy, within_s=60)
            mix = {"store": 4.0, "get": 3.0, "list": 1.0, "search": 2.0}
            plan = Plan(cluster.address, users, mix, rate=100, timeout_s=3, file=result_file(tmp_path, "calls"))
            async with generating(plan) as generator:
                await generator.go()
                began = time.monotonic()
                await asyncio.sleep(3)
                disk.fill()
                await _use_up_the_rest(cluster.address, of_the_test)
                filled = time.monotonic()
                await asyncio.sleep(full_s)
                freed = time.monotonic()
                disk.free()
                await asyncio.sleep(8)
                calls = await generator.stop()
            async with database(cluster.shard_dsn(FULL, owner=True)) as connection:
                there = await connection.fetchval("SELECT count(*) FROM memories WHERE user_id = ANY($1)", users[FULL])
    others_failed = calls.where(but_group=FULL, since=began, outcome="failed").counts()
    stores, reads = ("store",), ("get", "list", "search")
    refused = calls.where(group=FULL, since=filled, until=freed, kinds=stores, outcome="failed")
    reads_failed = calls.where(group=FULL, since=filled, until=freed, kinds=reads, outcome="failed")
    all_reads = calls.where(group=FULL, since=filled, until=freed, kinds=reads)
    after = calls.where(group=FULL, since=freed, kinds=stores, outcome="failed").rows["at"]
    back_s = float(after.max() - freed) if len(after) else 0.0
    mine = calls.where(group=FULL, since=began, kinds=stores)
    acknowledged = len(mine.where(outcome="OK")) + len(users[FULL]) * plan.memories
    in_doubt = len(mine) - len(mine.where(outcome=("OK", *_REFUSED)))
    record(
        "a shard's disk full",
        "users of the others: 0 errors; its own: writes refused cleanly, reads go on; back by itself once there is "
        "room; nothing acknowledged is lost",
        f"others: {others_failed.total()} failed; its own: {len(refused)} writes refused, {len(reads_failed)} of "
        f"{len(all_reads)} reads failed; {acknowledged} acknowledged, {there} there ({in_doubt} in doubt); "
        f"all well {back_s:.1f} s after there was room",
    )
    print(f"its own: {dict(calls.where(group=FULL, since=began).counts())}")
    assert others_failed == {}
    assert len(refused) > 0
    assert all(name.startswith(_CLEAN) for name in calls.where(group=FULL).counts())
    assert not reads_failed.counts()
    assert acknowledged <= there <= acknowledged + in_doubt
    assert back_s < 5


async def _use_up_the_rest(address: str, user: str) -> None:
    """Stores large memories until one is refused for want of room. How much that takes is the database's affair."""
    async with memory_service(address) as api, asyncio.timeout(30):
        reason = ""
        while not reason:
            try:
                await api.StoreMemory(store_request(user, secrets.token_hex(32 * 1024), embedding=[1.0] * 16))
            except grpc.aio.AioRpcError as refused:
                reason = reason_of(refused)
    assert reason in {"DATABASE_UNAVAILABLE", "BREAKER_OPEN", "READ_ONLY"}


async def test_a_full_disk_refuses_writes_and_loses_none(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, full_s=5)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_disk_that_is_full_for_a_minute_refuses_writes_and_loses_none(record: Record, tmp_path: Path) -> None:
    await scenario(record, tmp_path, full_s=60)
