"""`python -m tests.support.counted_router`: the router, and beside it a socket that says which tasks it has.

Whoever connects to the Unix socket that the environment names in SOCKET is told.
"""

import argparse
import asyncio
import json
import os
from collections import Counter
from pathlib import Path

from common import config, lifecycle
from common.config import RouterSettings
from router.__main__ import main

SOCKET = "MEMSHARD_TEST_COUNTS_SOCKET"


async def counts(socket: Path) -> Counter[str]:
    """The tasks of such a router by what they run, without the one that tells."""
    reader, writer = await asyncio.open_unix_connection(socket)
    found: dict[str, int] = json.loads(await reader.read())
    writer.close()
    return Counter(found)


async def _tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    tasks = Counter(_name(task) for task in asyncio.all_tasks() if task is not asyncio.current_task())
    writer.write(json.dumps(tasks).encode())
    await writer.drain()
    writer.close()


def _name(task: "asyncio.Task[object]") -> str:
    coroutine = task.get_coro()
    return getattr(coroutine, "__qualname__", repr(coroutine))


async def _main(settings: RouterSettings) -> None:
    async with await asyncio.start_unix_server(_tell, os.environ[SOCKET]):
        await main(settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    arguments = parser.parse_args()
    lifecycle.run("router", lambda: config.load(RouterSettings, arguments.config), _main)
