"""Speaking to one shard directly, as a router would, and to its database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from common import catalog
from common.postgres import Pool
from common.slots import slot_of
from common.topology import Shard, Topology
from memshard.internal.v1 import shard_pb2, shard_pb2_grpc
from memshard.v1 import memory_pb2, memory_pb2_grpc
from shard.database import settle
from shard.timed_connection import LONGEST_S, TimedConnection

if TYPE_CHECKING:
    from memshard.internal.v1.shard_pb2_grpc import ShardServiceAsyncStub
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@asynccontextmanager
async def memory_service(address: str) -> "AsyncIterator[MemoryServiceAsyncStub]":
    """The public API at `address`, without the SDK: what it answers is seen as it is."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield memory_pb2_grpc.MemoryServiceStub(channel)


@asynccontextmanager
async def shard_service(address: str) -> "AsyncIterator[ShardServiceAsyncStub]":
    """The internal API at `address`."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield shard_pb2_grpc.ShardServiceStub(channel)


@asynccontextmanager
async def database(dsn: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """A connection that is closed at the end."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def pool_of_one(dsn: str) -> AsyncIterator[Pool]:
    """What a shard's way to its database is made of, with one connection."""
    async with asyncpg.create_pool(
        dsn,
        min_size=1,
        max_size=1,
        connection_class=TimedConnection,
        reset=settle,
        server_settings={"statement_timeout": f"{LONGEST_S}s"},
    ) as pool:
        yield pool


async def topology_of(catalog_dsn: str) -> Topology:
    """The topology as the catalog has it now."""
    async with database(catalog_dsn) as connection:
        return await catalog.read_topology(connection)


def route(topology: Topology, shard: Shard, slot: int) -> shard_pb2.Route:
    """A route to one slot."""
    return shard_pb2.Route(
        cluster_id=topology.cluster_id,
        shard_id=shard.shard_id,
        epoch=topology.epoch,
        ranges=[shard_pb2.SlotRange(first=slot, last=slot)],
    )


def user_slot(user_id: str) -> int:
    """Where a user's memories are, worked out apart from the router."""
    return slot_of(user_id.encode())


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """The machine reason of an error, read from its details as any client would."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            return str(info.reason)
    return ""


async def is_ambiguous(api: "MemoryServiceAsyncStub", memory_id: str) -> bool:
    """Whether a router says that several users have the id."""
    try:
        await api.GetMemory(memory_pb2.GetMemoryRequest(id=memory_id))
    except grpc.aio.AioRpcError as error:
        return reason_of(error) == "AMBIGUOUS"
    return False


def fields_of(error: grpc.aio.AioRpcError) -> list[str]:
    """The fields that an error names."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    names: list[str] = []
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Is(request.DESCRIPTOR):
            detail.Unpack(request)
            names += [violation.field for violation in request.field_violations]
    return names


def store_request(user_id: str, content: str, memory_id: str = "", **fields: object) -> memory_pb2.StoreMemoryRequest:
    """A store request; `fields` are those of Memory."""
    memory = memory_pb2.Memory(user_id=user_id, content=content, id=memory_id, **fields)  # type: ignore[arg-type]
    return memory_pb2.StoreMemoryRequest(memory=memory)
