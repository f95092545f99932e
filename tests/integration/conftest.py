"""Clusters for all tests here; each test has users of its own.

`cluster` has three shards and the default placement. `everywhere` is each placement in turn, and one shard alone: for
tests of what must be the same under all of them.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support.cluster import PATIENT_WITH_REDIS, LocalCluster
from tests.support.wire import memory_service

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@pytest_asyncio.fixture(scope="session")
async def cluster() -> AsyncIterator[LocalCluster]:
    """A running cluster of three shards with the local embedder."""
    async with LocalCluster(shards=3, environment=PATIENT_WITH_REDIS) as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def api(cluster: LocalCluster) -> "AsyncIterator[MemoryServiceAsyncStub]":
    """The cluster's public API."""
    async with memory_service(cluster.address) as stub:
        yield stub


@dataclass(frozen=True)
class Somewhere:
    """A cluster, its placement, and its API."""

    cluster: LocalCluster
    placement: str
    api: "MemoryServiceAsyncStub"


@pytest_asyncio.fixture(
    scope="session",
    params=["user_based 1", "user_based 3", "content_hash 3", "temporal 3", "memory_type 3"],
)
async def everywhere(request: pytest.FixtureRequest) -> AsyncIterator[Somewhere]:
    """A cluster of each kind, one at a time."""
    placement, shards = request.param.split()
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(LocalCluster(shards=int(shards), options=["--placement", placement]))
        yield Somewhere(running, placement, await stack.enter_async_context(memory_service(running.address)))
