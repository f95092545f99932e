"""ClusterService as the routers serve it: where it is, and calls of it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from common import status
from common.bearer import credentials
from local.admin_token import read_token
from local.cluster import admin_of
from local.errors import DataDirectoryError, LocalClusterError
from local.layout import Layout
from local.ports import HOST
from local.record import load_record
from local.state import load_state
from memshard.admin.v1 import cluster_pb2 as pb
from memshard.admin.v1 import cluster_pb2_grpc
from memshard.v1.memory_pb2 import DegradationLevel

R = TypeVar("R")

_TIMEOUT_S = 30.0
_OPTIONS = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True, slots=True)
class RouterAdmin:
    """One router's ClusterService."""

    name: str
    """The router's, or where it was said to be."""
    address: str
    token: str

    async def health(self, *, fresh: bool) -> pb.HealthReport:
        """How everything is that it needs. `fresh`: looked at now. Raises LocalClusterError."""
        answer: pb.GetHealthResponse = await self._call("GetHealth", pb.GetHealthRequest(fresh=fresh))
        return answer.report

    async def stats(self) -> pb.GetStatsResponse:
        """What it counts. Raises LocalClusterError."""
        answer: pb.GetStatsResponse = await self._call("GetStats", pb.GetStatsRequest())
        return answer

    async def hot_users(self, most: int, *, names: bool) -> pb.GetHotUsersResponse:
        """Who is asked about most. `names`: by id, not by hash. Raises LocalClusterError."""
        request = pb.GetHotUsersRequest(most=most, names=names)
        answer: pb.GetHotUsersResponse = await self._call("GetHotUsers", request)
        return answer

    async def recover(self, *, test_after: bool) -> pb.RecoverResponse:
        """Has it try what may help. Raises LocalClusterError."""
        answer: pb.RecoverResponse = await self._call("Recover", pb.RecoverRequest(test_after=test_after))
        return answer

    async def set_degradation(self, shard_id: str, level: int) -> int:
        """Sets the level of a shard, or (empty) of the cluster; 0 leaves it to the routers. The epoch that has it.

        Raises LocalClusterError.
        """
        request = pb.SetDegradationRequest(shard_id=shard_id, level=DegradationLevel.ValueType(level))
        answer: pb.SetDegradationResponse = await self._call("SetDegradation", request)
        return answer.epoch

    async def _call(self, rpc: str, request: Message) -> Any:
        try:
            async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
                call = getattr(cluster_pb2_grpc.ClusterServiceStub(channel), rpc)
                return await call(request, metadata=credentials(self.token), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            told = status.from_rpc_error(error)
            if told is None:
                raise LocalClusterError(f"{self.name} does not answer at {self.address}: {error.details()}") from error
            raise LocalClusterError(f"{self.name}: {told.message}") from error


def at(address: str, token_file: Path) -> RouterAdmin:
    """The router whose admin port is there. Raises LocalClusterError."""
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LocalClusterError(f"{token_file}: {getattr(error, 'strerror', None) or 'is no text'}") from error
    return RouterAdmin(address, address, token)


def of_cluster(layout: Layout) -> list[RouterAdmin]:
    """The routers of an embedded cluster, running or not. Raises DataDirectoryError."""
    if not layout.exists():
        raise DataDirectoryError(f"there is no cluster in {layout.root}")
    ports, token = load_record(layout).ports, read_token(layout)
    names = [process.name for process in load_state(layout).processes if process.role == "router"]
    routers = [RouterAdmin(name, f"{HOST}:{ports[admin_of(name)]}", token) for name in names if admin_of(name) in ports]
    if not routers:
        raise DataDirectoryError(f"nothing is known of a router of {layout.root}; was it started?")
    return routers


async def of_each(
    routers: list[RouterAdmin], ask: Callable[[RouterAdmin], Awaitable[R]]
) -> list[tuple[RouterAdmin, R | LocalClusterError]]:
    """What each router answers, or why it does not."""

    async def answer(router: RouterAdmin) -> R | LocalClusterError:
        try:
            return await ask(router)
        except LocalClusterError as error:
            return error

    return list(zip(routers, await asyncio.gather(*map(answer, routers)), strict=True))
