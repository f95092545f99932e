"""The README's examples, run as written."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.support.cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def example_in_readme(language: str, fence: str) -> str:
    found = re.search(rf"<!-- tested: {language} -->\n```{fence}\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no tested {language} block"
    return found[1]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running() -> AsyncIterator[LocalCluster]:
    async with LocalCluster(shards=2) as cluster:
        yield cluster


async def run(cluster: LocalCluster, *command: str) -> str:
    environment = os.environ | {
        "MEMSHARD_ADDRESS": cluster.address,
        "MEMSHARD_DATA_DIR": str(cluster.data_dir),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_shell_example_runs_as_written(running: LocalCluster) -> None:
    # The environment of the tests stands in for `.venv`.
    lines = [line for line in example_in_readme("shell", "sh").splitlines() if "activate" not in line]
    output = await run(running, "bash", "-euo", "pipefail", "-c", "\n".join(lines))
    for expected in ("Alice drinks green tea", "7 memories are stored", "allergic to walnuts", "The tomatoes go out"):
        assert expected in output


async def test_the_python_example_runs_as_written(running: LocalCluster) -> None:
    code = example_in_readme("python", "python").replace("localhost:50051", running.address)
    output = await run(running, sys.executable, "-c", code)
    assert "LOCAL" in output
    assert "The spare key is under the blue flower pot" in output


async def test_every_file_that_the_documents_link_to_is_there() -> None:
    for document in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


async def test_every_file_that_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`((?:cli|common|local|router|sdk|shard|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
