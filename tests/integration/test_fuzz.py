"""No request, however strange, is ever INTERNAL or UNKNOWN, nor takes a server down.

MEMSHARD_FUZZ_SEED=n repeats a run. In CI the seed is always the same, as the examples of properties are.
"""

import asyncio
import os
import random
import uuid
from collections import Counter
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb
from memshard.v1.memory_pb2_grpc import MemoryServiceStub
from tests.support.cluster import LocalCluster
from tests.support.generated_requests import Generated, requests
from tests.support.wire import fields_of, reason_of, store_request

_EXAMPLES = 110
_EXAMPLES_BY_CONTENT = 30
_REQUESTS = 25  # Sent side by side in each example, so that they also meet each other.
_SERVICE = pb.DESCRIPTOR.services_by_name["MemoryService"]
# What a request by itself can bring about. A healthy cluster is never UNAVAILABLE, nor late.
_EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


SEED_IN_CI = 463_841_636  # One that found a deadlock.


async def test_no_request_is_a_bug_and_the_servers_keep_serving(cluster: LocalCluster) -> None:
    await check(cluster, _EXAMPLES)


async def test_no_request_is_a_bug_with_memories_placed_by_content() -> None:
    """Where a request is several calls to shards."""
    async with LocalCluster(shards=3, options=["--placement", "content_hash"]) as cluster:
        await check(cluster, _EXAMPLES_BY_CONTENT)


async def check(cluster: LocalCluster, examples: int) -> None:
    """Sends so many examples' requests."""
    fresh = SEED_IN_CI if os.environ.get("CI") else random.randrange(2**32)
    number = int(os.environ.get("MEMSHARD_FUZZ_SEED", fresh))
    print(f"MEMSHARD_FUZZ_SEED={number}")
    before = await _pids(cluster)

    seen, faults = await asyncio.to_thread(_fuzz, cluster.address, number, examples)

    print(dict(seen.most_common()))
    assert not faults, "\n".join(faults[:10])
    assert sum(seen.values()) >= examples * _REQUESTS * 0.75
    assert seen["OK"] > sum(seen.values()) / 10, "too few requests got past validation"
    assert await _pids(cluster) == before, "a server was restarted"
    assert await cluster.healthy()
    with grpc.insecure_channel(cluster.address) as channel:
        api = MemoryServiceStub(channel)
        user = f"user-{uuid.uuid4()}"
        stored = api.StoreMemory(store_request(user, "the tomatoes go out in May"), timeout=10)
        found = api.SearchMemories(pb.SearchMemoriesRequest(user_id=user, query="when do tomatoes go out?"), timeout=10)
        assert [result.memory.id for result in found.results] == [stored.memory.id]
        everywhere = api.SearchMemories(pb.SearchMemoriesRequest(query="tomatoes"), timeout=10)
        assert everywhere.report.shards.succeeded == everywhere.report.shards.total == 3


async def _pids(cluster: LocalCluster) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in (await cluster.status())["processes"]}


def _fuzz(address: str, number: int, examples: int) -> tuple["Counter[str]", list[str]]:
    """Sends generated requests; returns how many got which code, and what is wrong with an answer.

    Hypothesis only makes the requests. What they meet depends on all that were sent before, so that it could neither
    shrink nor repeat what it found.
    """
    seen: Counter[str] = Counter()
    faults: list[str] = []
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(requests(), min_size=_REQUESTS, max_size=_REQUESTS))
        def send(generated: list[Generated]) -> None:
            calls = [(request, _call(channel, request)) for request in generated]
            for (rpc, data), call in calls:
                code = call.code()
                seen[code.name] += 1
                if code is not grpc.StatusCode.OK and (fault := _fault(code, call)):
                    faults.append(
                        f"{fault}: {code.name}, {call.details()}, to {rpc} {data[:1000]!r} ({len(data)} bytes)"
                    )

        send()
    return seen, faults


def _fault(code: grpc.StatusCode, call: Any) -> str:
    """What is wrong with this error; nothing, as a rule."""
    if code not in _EXPECTED:
        return "no code for a request"
    reason = reason_of(call)
    if not reason:
        return "without a reason"
    if code is grpc.StatusCode.INVALID_ARGUMENT and reason != "MALFORMED_REQUEST" and not fields_of(call):
        return f"{reason} without a field"
    return ""


def _call(channel: grpc.Channel, request: Generated) -> Any:  # What it is, call and future in one, has no type.
    rpc, data = request
    method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE.full_name}/{rpc}")
    return method.future(data, timeout=20)
