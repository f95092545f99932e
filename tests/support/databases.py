"""The databases of an embedded cluster alone, without its services: in this process, or in one that can be killed.

`python -m tests.support.databases DIR` runs them until SIGTERM, and prints a line when they are ready.
"""

import asyncio
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from local import leftovers, lock, up
from local.cluster import Plan
from local.layout import Layout
from local.record import Options
from local.shard_servers import ShardServers
from local.supervisor import Hooks

LOG = logging.getLogger("memshard.supervisor")


@contextmanager
def fresh_layout() -> Iterator[Layout]:
    """A data directory of the test's own; whatever runs in it at the end is killed."""
    layout = Layout.of(Path(tempfile.mkdtemp(prefix="memshard-test-")))
    try:
        yield layout
    finally:
        for found in leftovers.find(layout.root):
            found.process.kill()
        shutil.rmtree(layout.root, ignore_errors=True)


@asynccontextmanager
async def running(layout: Layout, options: Options | None = None) -> AsyncIterator[Plan]:
    """One shard's databases, catalog and Redis, ready; ended in order at the end.

    Without `options` a cluster that is there stays what it is, and a new one has no standbys.
    """
    async with supervised(layout, options) as (plan, _):
        yield plan


@asynccontextmanager
async def supervised(
    layout: Layout, options: Options | None = None
) -> AsyncIterator[tuple[Plan, Mapping[str, ShardServers]]]:
    """The same, with what the supervisor has of each shard."""
    layout.claim()
    with lock.held(layout):
        await leftovers.end_all(layout.root)
        options = options or (Options() if layout.exists() else Options(shards=1, replicas=0))
        plan, programs = await up.prepare(layout, options, (), LOG)
        ready = asyncio.Event()
        shards = up.shard_servers(plan, programs, LOG)
        supervisor = up.supervise(plan, programs, shards, Hooks(ready=ready.set), LOG, services=False)
        async with asyncio.TaskGroup() as group:
            run = group.create_task(supervisor.run())
            waiting = group.create_task(ready.wait())
            await asyncio.wait([run, waiting], return_when=asyncio.FIRST_COMPLETED)
            try:
                yield plan, shards
            finally:
                waiting.cancel()
                supervisor.stop()


@asynccontextmanager
async def in_a_process(
    layout: Layout, *, until: Callable[[], bool] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The same in a process of its own, once they are ready, or `until` says so. It is killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.databases", str(layout.root), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        if until is None:
            assert await process.stdout.readline() == b"ready\n"
        else:
            async with asyncio.timeout(30):
                while not until():
                    await asyncio.sleep(0.001)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _main(root: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running(Layout.of(root)):
        print("ready", flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
