"""What calls cost that do nothing: `python -m loadtest.bench.echo [--to HOST:PORT]` gives back what it is sent.

With `--to` it asks another such service and gives back its answer, as a router asks a shard. Nothing is parsed,
looked up or checked, so that what a cluster of as many hops reaches at most on this machine is what these do.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import uvloop

from loadtest.bench.contender import Endpoint, Row, Watch
from loadtest.bench.workload import Vector

_SERVICE = "memshard.bench.Echo"
_METHOD = f"/{_SERVICE}/Say"
# Bytes of the answer to a get without an embedding, and of a memory to store besides the embedding, about.
_MEMORY_BYTES = 300
_TIMEOUT_S = 30.0


class Echo:
    """A contender that is answered with what it said."""

    def __init__(self) -> None:
        self.watch = Watch()

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint["address"])
        self._say: Callable[..., Awaitable[bytes]] = self._channel.unary_unary(_METHOD)
        self._memory = bytes(_MEMORY_BYTES)
        self._embedded = bytes(_MEMORY_BYTES + 4 * dimensions)

    async def close(self) -> None:
        await self._channel.close()

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        raise NotImplementedError

    async def store(self, caller: int, row: Row) -> None:
        await self._say(self._embedded, timeout=_TIMEOUT_S)

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        return await self._say(self._memory, timeout=_TIMEOUT_S)

    get_again = get

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        raise NotImplementedError


@asynccontextmanager
async def serving(to: str = "") -> AsyncIterator[str]:
    """A process that echoes, behind which another one is where it is told of one; its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.bench.echo", *(["--to", to] if to else []), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _main(to: str) -> None:
    server = grpc.aio.server()
    channel = grpc.aio.insecure_channel(to) if to else None
    behind: Callable[..., Awaitable[bytes]] | None = channel.unary_unary(_METHOD) if channel is not None else None

    async def say(request: bytes, _: Any) -> bytes:
        return request if behind is None else await behind(request, timeout=_TIMEOUT_S)

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(say)
    # Known to the server by name, as the services' own are (common/methods.py).
    server.add_registered_method_handlers(_SERVICE, {"Say": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.echo", description=__doc__)
    parser.add_argument("--to", default="", metavar="HOST:PORT", help="another one, which is asked")
    uvloop.run(_main(parser.parse_args().to))
