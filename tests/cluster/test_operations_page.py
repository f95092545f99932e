"""The commands of docs/operations.md, run as written."""

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster.test_readme import ROOT, run
from tests.support.cluster import LocalCluster
from tests.support.eventually import eventually

PAGE = (ROOT / "docs" / "operations.md").read_text()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running() -> AsyncIterator[LocalCluster]:
    async with LocalCluster(shards=2) as cluster:
        yield cluster


async def is_healthy(cluster: LocalCluster) -> bool:
    return "is healthy" in await run(cluster, "memshard", "health")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("health", ["router-0 is healthy", "synthetic  shard-1", '"overall": "healthy"']),
        ("recover", ["nothing to try", '"recoveries": []']),
        ("degrade", ["The degradation level of shard-1 is set to readonly", "left to the routers"]),
    ],
)
async def test_the_commands_run_as_written(running: LocalCluster, block: str, expected: list[str]) -> None:
    await eventually(lambda: is_healthy(running), within_s=60)
    found = re.search(rf"<!-- tested: {block} -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"operations.md has no tested {block} block"
    output = await run(running, "bash", "-euo", "pipefail", "-c", found[1])
    for text in expected:
        assert text in output
