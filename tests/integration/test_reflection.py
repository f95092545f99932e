"""A client that knows nothing of the project: it learns the API by reflection, and uses it."""

import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.support.cluster import LocalCluster
from tests.support.wire import topology_of


class Stranger:
    """Calls methods of a service that it has just learned of."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        self._channel = channel
        self._service = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(service)

    def call(self, rpc: str, **fields: Any) -> Any:
        method = self._service.methods_by_name[rpc]
        answer = GetMessageClass(method.output_type)
        call: grpc.UnaryUnaryMultiCallable[Any, Any] = self._channel.unary_unary(
            f"/{self._service.full_name}/{rpc}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return call(GetMessageClass(method.input_type)(**fields), timeout=10)


def test_a_client_by_reflection_alone_stores_fetches_lists_and_searches(cluster: LocalCluster, user: str) -> None:
    memory_id = str(uuid.uuid4())
    with grpc.insecure_channel(cluster.address) as channel:
        api = Stranger(channel, "memshard.v1.MemoryService")
        stored = api.call(
            "StoreMemory", memory={"id": memory_id, "user_id": user, "content": "The key is under the mat"}
        )
        assert stored.memory.id == memory_id
        assert stored.receipt.consistency_token
        assert stored.receipt.durability == 1
        assert api.call("GetMemory", id=memory_id).memory.user_id == user
        assert [m.id for m in api.call("ListMemories", user_id=user).memories] == [memory_id]
        found = api.call("SearchMemories", user_id=user, query="Where is the key?")
        assert [r.memory.id for r in found.results] == [memory_id]
        assert api.call("DeleteMemory", id=memory_id, user_id=user).deleted
        with pytest.raises(grpc.RpcError) as missing:
            api.call("GetMemory", id=memory_id)
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND


async def test_every_service_offers_reflection_and_health(cluster: LocalCluster) -> None:
    topology = await topology_of(cluster.catalog_dsn())
    shards = [shard.address for shard in topology.shards]
    services = {cluster.address: "memshard.v1.MemoryService"} | dict.fromkeys(
        shards, "memshard.internal.v1.ShardService"
    )
    for address, service in services.items():
        with grpc.insecure_channel(address) as channel:
            assert service in ProtoReflectionDescriptorDatabase(channel).get_services()
            health: Any = health_pb2_grpc.HealthStub(channel)  # Its published stubs lack the methods.
            for name in ("", service):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
