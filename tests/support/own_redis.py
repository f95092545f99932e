"""A Redis of a test's own."""

import asyncio
from typing import Self

from local import probes
from local.binaries import redis_server
from tests.support.cluster import free_port
from tests.support.eventually import eventually


class OwnRedis:
    """A redis-server that can be killed and started again, empty, on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> Self:
        options = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "")
        self._process = await asyncio.create_subprocess_exec(
            str(redis_server()), *options, stdout=asyncio.subprocess.DEVNULL
        )
        await eventually(lambda: probes.answers_ping(self.url))
        return self

    async def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None
