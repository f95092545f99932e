"""One cluster of three shards for all tests here; each test has users of its own."""

import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support.cluster import LocalCluster
from tests.support.wire import memory_service

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub


@pytest_asyncio.fixture(scope="session")
async def cluster() -> AsyncIterator[LocalCluster]:
    """A running cluster of three shards with the local embedder."""
    async with LocalCluster(shards=3) as running:
        yield running


@pytest_asyncio.fixture(scope="session")
async def api(cluster: LocalCluster) -> "AsyncIterator[MemoryServiceAsyncStub]":
    """The cluster's public API."""
    async with memory_service(cluster.address) as stub:
        yield stub


@pytest.fixture
def user() -> str:
    """A user that nobody else has."""
    return f"user-{uuid.uuid4()}"
