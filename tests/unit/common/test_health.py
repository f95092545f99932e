"""grpc.health.v1 as balancers, Kubernetes and container engines ask it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from common.health import LIVENESS, Health
from common.healthcheck import check

_ROOT = Path(__file__).resolve().parents[3]
_NAME = "memshard.v1.MemoryService"


@asynccontextmanager
async def served(health: Health) -> AsyncIterator[str]:
    server = grpc.aio.server()
    health.methods().add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def asked(address: str, *service: str) -> str:
    return await asyncio.to_thread(check, address, *service)


async def test_it_says_serving_when_it_can_serve_and_lives_whether_it_can_or_not() -> None:
    health = Health([_NAME])
    async with served(health) as address:
        assert [await asked(address, name) for name in ("", _NAME)] == ["NOT_SERVING"] * 2
        assert await asked(address, LIVENESS) == "SERVING"
        health.set(True)
        assert [await asked(address, name) for name in ("", _NAME, LIVENESS)] == ["SERVING"] * 3
        health.stop()
        assert [await asked(address, name) for name in ("", _NAME)] == ["NOT_SERVING"] * 2
        assert await asked(address, LIVENESS) == "SERVING"
        assert await asked(address, "no.such.Service") == "NOT_FOUND"
    assert await asked(address) == "UNAVAILABLE"


@pytest.mark.parametrize(("serving", "code", "told"), [(True, 0, "SERVING"), (False, 1, "NOT_SERVING")])
async def test_the_command_of_containers_ends_with_what_it_found(serving: bool, code: int, told: str) -> None:
    health = Health([_NAME])
    health.set(serving)
    async with served(health) as address:
        for given, variables in (([address, _NAME], {}), ([], {"MEMSHARD_HEALTH_ADDRESS": address})):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "common.healthcheck", *given),
                stdout=asyncio.subprocess.PIPE,
                cwd=_ROOT,
                env={"PYTHONPATH": f"{_ROOT}:{_ROOT / 'sdk'}", **variables},
            )
            output, _ = await process.communicate()
            assert (process.returncode, output.decode().strip()) == (code, told)
