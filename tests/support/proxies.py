"""Proxies in a process of their own, so that what passes through them does not wait for a test's event loop.

The process takes one command a line on its standard input, and answers each with one line.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from tests.support.proxy import Fault, Proxy


class Proxies:
    """`async with Proxies({"shard-0": "127.0.0.1:5000"}) as proxies:` has a proxy for each address, by name."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        self.addresses: dict[str, str] = {}
        """Where each listens."""
        self._targets = dict(targets)
        self._process: asyncio.subprocess.Process | None = None
        # One question after the other.
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.proxies",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.addresses = await self._ask(self._targets)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def inflict(self, fault: Fault, *names: str, amount: float = 0.0) -> None:
        """Begins a fault at the proxies named."""
        await self._ask({"inflict": fault, "names": names, "amount": amount})

    async def heal(self, *names: str) -> None:
        """Ends the faults of the proxies named; of all without a name."""
        await self._ask({"heal": names or tuple(self.addresses)})

    async def requests(self) -> dict[str, int]:
        """How many gRPC requests have reached the target of each, without looks at its health."""
        counts: dict[str, int] = await self._ask({"requests": True})
        return counts

    async def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        async with self._turn:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            await self._process.stdin.drain()
            return json.loads(await self._process.stdout.readline())


async def _main() -> None:
    commands = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with AsyncExitStack() as stack:
        proxies: dict[str, Proxy] = {}
        for name, address in json.loads(await commands.readline()).items():
            host, _, port = address.rpartition(":")
            proxies[name] = await stack.enter_async_context(Proxy(host, int(port)))
        _say({name: proxy.address for name, proxy in proxies.items()})
        while line := await commands.readline():
            command = json.loads(line)
            for name in command.get("heal", ()):
                proxies[name].heal()
            for name in command.get("names", ()):
                proxies[name].inflict(Fault(command["inflict"]), command["amount"])
            _say({name: proxy.requests for name, proxy in proxies.items()})


def _say(answer: Mapping[str, Any]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    asyncio.run(_main())
