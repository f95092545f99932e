"""The benchmark's callers of memshard: what an answer says of its degradation level is seen, whoever asks."""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from loadtest.bench.clustered import Routed, WithClient
from loadtest.bench.contender import Endpoint, Row
from memshard.v1 import memory_pb2 as pb
from tests.unit.sdk.server import serving

_EMBEDDING = np.ones(4, dtype=np.float32)


class _Service:
    """Answers everything at one level, and keeps the read levels of gets."""

    def __init__(self) -> None:
        self.level = pb.DEGRADATION_LEVEL_REDUCED
        self.read: list[int] = []

    def get(self, request: pb.GetMemoryRequest, _: grpc.ServicerContext) -> pb.GetMemoryResponse:
        self.read.append(request.read.level)
        return pb.GetMemoryResponse(report=pb.ReadReport(degradation_level=self.level))

    def search(self, _: pb.SearchMemoriesRequest, __: grpc.ServicerContext) -> pb.SearchMemoriesResponse:
        return pb.SearchMemoriesResponse(report=pb.ReadReport(degradation_level=self.level))

    def store(self, _: pb.StoreMemoryRequest, __: grpc.ServicerContext) -> pb.StoreMemoryResponse:
        return pb.StoreMemoryResponse(receipt=pb.WriteReceipt(degradation_level=self.level))


@pytest.fixture
def service() -> _Service:
    return _Service()


@pytest.fixture
def address(service: _Service) -> Iterator[str]:
    with serving(GetMemory=service.get, SearchMemories=service.search, StoreMemory=service.store) as where:
        yield where


@pytest.mark.parametrize("kind", [Routed, WithClient])
async def test_answers_under_a_level_are_counted(
    kind: type[Routed] | type[WithClient], service: _Service, address: str
) -> None:
    contender = kind()
    await contender.open(Endpoint(address=address), 1, 4)
    try:
        for _ in range(2):
            await contender.search(0, "user", _EMBEDDING)
            await contender.store(0, Row("user", "00000000-0000-4000-8000-000000000001", "text", _EMBEDDING))
            await contender.get(0, "user", "some-id")
            await contender.get_again(0, "user", "some-id")
            service.level = pb.DEGRADATION_LEVEL_NORMAL
    finally:
        await contender.close()
    assert contender.watch.levels == {"DEGRADATION_LEVEL_REDUCED": 4}
    # The one is past every cache, the other as agents ask.
    one, again = service.read[:2]
    assert one in (pb.READ_LEVEL_UNSPECIFIED, pb.READ_LEVEL_STRONG)
    assert again == pb.READ_LEVEL_SESSION
