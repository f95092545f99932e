"""The image, built and run: a whole cluster of containers, as compose makes it, with the override for one base image.

It needs a container engine. MEMSHARD_TEST_BASE names a base image that is there, where none can be pulled.
"""

import asyncio
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import pytest
import pytest_asyncio

from memshard import AsyncMemoryClient, Durability, MemshardError, ReadLevel
from tests.deploy import compose
from tests.support.cluster import free_port
from tests.support.eventually import eventually

_BASE = "python:3.12-slim-bookworm"
_BUILD_TIMEOUT_S = 900
_START_TIMEOUT_S = 180

pytestmark = pytest.mark.timeout(_BUILD_TIMEOUT_S + _START_TIMEOUT_S)


def docker(*arguments: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
    """A docker command, whatever becomes of it."""
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )


def base_image() -> str:
    """A base that can be built on. Skips the test where there is no engine, or nothing to build on."""
    if shutil.which("docker") is None or docker("info", "--format", "{{.ServerVersion}}").returncode != 0:
        pytest.skip("no container engine answers")
    if compose.command() is None:
        pytest.skip("there is neither `docker compose` nor docker-compose here")
    base = os.environ.get("MEMSHARD_TEST_BASE", _BASE)
    if docker("image", "inspect", base).returncode != 0 and docker("pull", base, timeout_s=300).returncode != 0:
        pytest.skip(f"the image {base} cannot be had; name one that is there in MEMSHARD_TEST_BASE")
    return base


@dataclass(frozen=True)
class Stack:
    """A running compose project."""

    project: str
    image: str
    ports: tuple[int, int]
    variables: dict[str, str]

    def compose(self, *arguments: str, timeout_s: float = 60) -> str:
        """A compose command; what it printed."""
        files = (compose.FILE, compose.LOCAL)
        return compose.run(*arguments, files=files, variables=self.variables, timeout_s=timeout_s).stdout

    def container(self, service: str) -> str:
        """A service's container."""
        return self.compose("ps", "-q", service).strip()

    def inspect(self, service: str) -> dict[str, object]:
        """What the engine knows of it."""
        found: list[dict[str, object]] = json.loads(docker("inspect", self.container(service)).stdout)
        return found[0]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack() -> AsyncIterator[Stack]:
    base = base_image()
    name = f"memshard-test-{uuid.uuid4().hex[:8]}"
    ports = (free_port(), free_port())
    passwords = {key: uuid.uuid4().hex for key in compose.example_environment() if key.endswith("PASSWORD")}
    variables = {
        **compose.example_environment(),
        **passwords,
        "COMPOSE_PROJECT_NAME": name,
        "MEMSHARD_IMAGE": f"{name}:test",
        "BASE": base,
        "ROUTER_0_PORT": str(ports[0]),
        "ROUTER_1_PORT": str(ports[1]),
    }
    running = Stack(name, variables["MEMSHARD_IMAGE"], ports, variables)
    try:
        await asyncio.to_thread(running.compose, "build", "init", timeout_s=_BUILD_TIMEOUT_S)
        await asyncio.to_thread(running.compose, "up", "--detach", timeout_s=_START_TIMEOUT_S)
        yield running
    finally:
        logs = await asyncio.to_thread(docker, "ps", "--all", "--filter", f"name={name}", timeout_s=60)
        print(logs.stdout)  # pytest shows it with a failure.
        await asyncio.to_thread(running.compose, "down", "--volumes", "--timeout", "20", timeout_s=120)
        await asyncio.to_thread(docker, "rmi", running.image)


async def test_what_is_stored_by_one_router_is_fetched_and_found_by_the_other(stack: Stack) -> None:
    async with (
        AsyncMemoryClient(f"127.0.0.1:{stack.ports[0]}") as one,
        AsyncMemoryClient(f"127.0.0.1:{stack.ports[1]}") as other,
    ):
        for client in (one, other):
            await eventually(partial(_answers, client), within_s=_START_TIMEOUT_S)

        users = [f"user-{number}" for number in range(20)]
        stored = {user: (await one.store(user, f"{user} drinks green tea")).memory for user in users}
        for user, memory in stored.items():
            assert (await other.get(memory.id, user_id=user, read=ReadLevel.STRONG)).content == memory.content
            found = await other.search("what does she drink?", user_id=user, read=ReadLevel.STRONG)
            assert [hit.memory.id for hit in found.results] == [memory.id]

        # Both shards have some, and a standby each: what is stored now is on two disks.
        await eventually(lambda: _is_on_a_quorum(one), within_s=30)


async def _answers(client: AsyncMemoryClient) -> bool:
    try:
        await client.search("anything", user_id="nobody", timeout_s=5)
    except MemshardError:
        return False
    return True


async def _is_on_a_quorum(client: AsyncMemoryClient) -> bool:
    receipts = [(await client.store(f"user-{number}", "more")).receipt for number in range(20)]
    return all(receipt.durability is Durability.QUORUM for receipt in receipts)


async def test_the_containers_are_healthy_and_have_no_rights(stack: Stack) -> None:
    for service in ("router-0", "shard-0", "shard-0-replica-1"):
        await eventually(partial(_is_healthy, stack, service), within_s=90)
        container = stack.container(service)
        assert docker("exec", container, "cat", "/proc/1/comm").stdout.strip() == "tini"
        assert docker("exec", container, "id", "-u").stdout.strip() == "10001"
        assert "Read-only file system" in docker("exec", container, "touch", "/new").stderr


def _is_healthy(stack: Stack, service: str) -> bool:
    state = stack.inspect(service)["State"]
    assert isinstance(state, dict)
    return bool(state["Health"]["Status"] == "healthy")


async def test_a_container_told_to_stop_drains_and_ends_well(stack: Stack) -> None:
    container = stack.container("router-1")
    await asyncio.to_thread(docker, "stop", "--time", "20", container, timeout_s=60)
    state = json.loads(docker("inspect", container).stdout)[0]["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert '"stopped"' in docker("logs", container).stdout + docker("logs", container).stderr


async def test_a_second_up_changes_nothing(stack: Stack) -> None:
    await asyncio.to_thread(stack.compose, "up", "--detach", timeout_s=_START_TIMEOUT_S)
    logs = stack.compose("logs", "--no-color", "init")
    assert "has been made; epoch 1" in logs
    assert "was there; epoch 1" in logs
