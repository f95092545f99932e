"""No request, however strange, is ever INTERNAL or UNKNOWN, nor takes a server down.

MEMSHARD_FUZZ_SEED=n repeats a run.
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

_EXAMPLES = 160
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


async def test_no_request_is_a_bug_and_the_servers_keep_serving(cluster: LocalCluster) -> None:
    number = int(os.environ.get("MEMSHARD_FUZZ_SEED", random.randrange(2**32)))
    print(f"MEMSHARD_FUZZ_SEED={number}")
    before = await _pids(cluster)
    seen: Counter[str] = Counter()

    await asyncio.to_thread(_fuzz, cluster.address, number, seen)

    print(dict(seen.most_common()))
    assert sum(seen.values()) >= 2000
    assert seen["OK"] > sum(seen.values()) / 20, "too few requests got past validation"
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


def _fuzz(address: str, number: int, seen: "Counter[str]") -> None:
    """Sends generated requests, and counts what they get."""
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel:

        @seed(number)
        @settings(
            max_examples=_EXAMPLES,
            database=None,
            print_blob=True,
            # A failure is told as it was found: sending everything again and again to shrink it takes minutes.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(requests(), min_size=_REQUESTS, max_size=_REQUESTS))
        def send(generated: list[Generated]) -> None:
            calls = [(sent, _call(channel, sent)) for sent in generated]
            for sent, call in calls:
                code = call.code()
                seen[code.name] += 1
                if code is grpc.StatusCode.OK:
                    continue
                told = f"{sent[0]} {sent[1][:2000]!r}: {code.name} {call.details()}"
                assert code in _EXPECTED, told
                error = call.exception()  # A call itself, of which the details can be read.
                assert reason_of(error), told
                if code is grpc.StatusCode.INVALID_ARGUMENT and reason_of(error) != "MALFORMED_REQUEST":
                    assert fields_of(error), told

        send()


def _call(channel: grpc.Channel, request: Generated) -> Any:  # What it is, call and future in one, has no type.
    rpc, data = request
    method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE.full_name}/{rpc}")
    return method.future(data, timeout=20)
