"""Calls of the supervisor's admin service, by whoever may read its token."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from common import status
from common.bearer import credentials
from local.admin_token import read_token
from local.cluster import ADMIN
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout
from local.ports import HOST
from local.record import load_record
from memshard.admin.v1 import cluster_pb2, cluster_pb2_grpc
from memshard.v1.memory_pb2 import DegradationLevel

_TIMEOUT_S = 30.0
_OPTIONS = (("grpc.enable_http_proxy", 0),)


async def failover(layout: Layout, shard_id: str, to_server: str) -> AsyncIterator[cluster_pb2.FailoverProgress]:
    """Hands a shard's writes over to a standby, `to_server` or (empty) the closest; the steps, as they are done.

    Raises LocalClusterError.
    """
    async with _service(layout) as (stub, metadata):
        request = cluster_pb2.FailoverRequest(shard_id=shard_id, to_server=to_server)
        async for progress in stub.Failover(request, metadata=metadata):
            yield progress


async def restart(layout: Layout, names: Sequence[str]) -> AsyncIterator[cluster_pb2.RestartProgress]:
    """Restarts these processes, or all, one after the other; each, as it is well again. Raises LocalClusterError."""
    async with _service(layout) as (stub, metadata):
        async for progress in stub.Restart(cluster_pb2.RestartRequest(names=names), metadata=metadata):
            yield progress


async def set_degradation(layout: Layout, shard_id: str, level: int) -> int:
    """Sets the level of a shard, or (empty) of the cluster; 0 leaves it to the routers. The epoch that has it.

    Raises LocalClusterError.
    """
    async with _service(layout) as (stub, metadata):
        request = cluster_pb2.SetDegradationRequest(shard_id=shard_id, level=DegradationLevel.ValueType(level))
        answer = await stub.SetDegradation(request, metadata=metadata, timeout=_TIMEOUT_S)
        return int(answer.epoch)


@asynccontextmanager
async def _service(layout: Layout) -> AsyncIterator[tuple[Any, tuple[tuple[str, str], ...]]]:
    if not layout.exists():
        raise DataDirectoryError(f"there is no cluster in {layout.root}")
    port = load_record(layout).ports.get(ADMIN)
    metadata = credentials(read_token(layout))
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=_OPTIONS) as channel:
            stub: Any = cluster_pb2_grpc.ClusterServiceStub(channel)  # Its type stubs leave out what it offers.
            yield stub, metadata
    except grpc.aio.AioRpcError as error:
        told = status.from_rpc_error(error)
        if told is None:
            raise LocalClusterError(f"the supervisor of {layout.root} does not answer: {error.details()}") from error
        raise LocalClusterError(told.message) from error


async def list_shards(layout: Layout) -> cluster_pb2.ListShardsResponse:
    """The shards, as the catalog has them. Raises LocalClusterError."""
    async with _service(layout) as (stub, metadata):
        answer: cluster_pb2.ListShardsResponse = await stub.ListShards(
            cluster_pb2.ListShardsRequest(), metadata=metadata, timeout=_TIMEOUT_S
        )
        return answer


async def list_moves(layout: Layout) -> cluster_pb2.ListMovesResponse:
    """The moves of slots that there were, oldest first. Raises LocalClusterError."""
    async with _service(layout) as (stub, metadata):
        answer: cluster_pb2.ListMovesResponse = await stub.ListMoves(
            cluster_pb2.ListMovesRequest(), metadata=metadata, timeout=_TIMEOUT_S
        )
        return answer


async def set_shard(layout: Layout, shard_id: str, status: str, weight: int) -> int:
    """Sets a shard's status, and its weight; empty, or 0: as it is. The new epoch. Raises LocalClusterError."""
    async with _service(layout) as (stub, metadata):
        request = cluster_pb2.SetShardRequest(shard_id=shard_id, status=status, weight=weight)
        answer = await stub.SetShard(request, metadata=metadata, timeout=_TIMEOUT_S)
        return int(answer.epoch)


async def pin_user(layout: Layout, user_id: str, shard_id: str) -> int:
    """Has a user's slot stay on a shard, or (empty) wherever; the slot. Raises LocalClusterError."""
    async with _service(layout) as (stub, metadata):
        request = cluster_pb2.PinUserRequest(user_id=user_id, shard_id=shard_id)
        answer = await stub.PinUser(request, metadata=metadata, timeout=_TIMEOUT_S)
        return int(answer.slot)


async def follow(layout: Layout, rpc: str, request: Message) -> AsyncIterator[Any]:
    """What an rpc that tells how far it is tells. Raises LocalClusterError."""
    async with _service(layout) as (stub, metadata):
        async for progress in getattr(stub, rpc)(request, metadata=metadata):
            yield progress
