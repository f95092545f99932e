"""The mover of the embedded cluster: a process of its own for each thing that is to be done, and what it tells."""

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from common.roles import MOVER
from local import logs, services
from local.cluster import Plan
from local.errors import LocalClusterError
from local.postgres import dsn_of_primary

NAME: Final = "mover"

_numbers = itertools.count(1)
# An event tells of one plan at most: a few hundred ranges.
_LINE_BYTES = 1024 * 1024
# A mover ends where it can be resumed once no slot is fenced any more, which has a bound.
_STOP_TIMEOUT_S = 20.0


def settings(plan: Plan, **more: Any) -> dict[str, Any]:
    """The mover's settings, for all shards that there are; `more` are settings of its own."""
    password = plan.secrets.memshard_mover
    shards = {
        shard_id: dsn_of_primary(list(plan.shard_servers(shard_id).values()), MOVER, password)
        for shard_id in plan.record.shard_ids()
    }
    catalog = plan.catalog_server().dsn(MOVER, password)
    return {**services.mover_settings(catalog=catalog, shards=shards), **more}


async def run(
    plan: Plan,
    *arguments: str,
    options: dict[str, Any] | None = None,
    started: Callable[[asyncio.subprocess.Process], None] = lambda _process: None,
) -> AsyncGenerator[dict[str, Any], None]:
    """Runs it with `arguments`; what it tells, as it does. `options` are settings of its own.

    When the caller leaves, it is told to end where it can be resumed. Raises LocalClusterError when it fails.
    """
    given = settings(plan, **(options or {}))
    # A file of its own, as others may be at work: with passwords in it, it is not kept.
    file = services.write_settings(plan.layout, f"{NAME}-{next(_numbers)}", given)
    log = logs.open_for(plan.layout.log(NAME))
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "shard.mover", "--config", str(file), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=plan.layout.run,
            env=services.environment(NAME, given, plan.layout.root),
            start_new_session=True,
            limit=_LINE_BYTES,
        )
    finally:
        os.close(log)
    started(process)
    last: dict[str, Any] = {}
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            last = json.loads(line)
            yield last
        await process.wait()
    finally:
        await asyncio.shield(_end(process))
        file.unlink(missing_ok=True)
    if last.get("event") != "done":
        why = last.get("why") or f"it ended with {process.returncode}; its log: {plan.layout.log(NAME)}"
        raise LocalClusterError(str(why))


async def last_of(plan: Plan, arguments: Sequence[str], options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What it tells last. Raises LocalClusterError."""
    last: dict[str, Any] = {}
    async for event in run(plan, *arguments, options=options):
        last = event
    return last


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            # What it still tells must not fill the pipe, or it would wait for a reader.
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
