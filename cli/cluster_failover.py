"""`memshard failover`: a shard's writes go over to one of its standbys."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
import json as as_json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cluster_options import DataDir, failures_shown
from cli.terminal import console

if TYPE_CHECKING:
    from local.layout import Layout


def failover(
    shard: Annotated[str, typer.Argument(metavar="SHARD", help="The shard, like shard-0.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="SERVER", help="The standby, like postgres-shard-0-1. Default: the closest one."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each step.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Hand a shard's writes over to a standby, in order: nothing is lost, and the old primary follows the new one.

    Only a standby that has all that was acknowledged may take over. When it cannot be, the old primary goes on, and
    the exit code is 1.
    """
    from local.layout import Layout

    with failures_shown():
        asyncio.run(_follow(Layout.of(data_dir), shard, to or "", as_lines=json))


async def _follow(layout: "Layout", shard: str, to: str, *, as_lines: bool) -> None:
    from local.admin_client import failover as steps
    from memshard.admin.v1.cluster_pb2 import FailoverStep

    began = time.monotonic()
    out = console()
    async for progress in steps(layout, shard, to):
        elapsed_s = time.monotonic() - began
        step = FailoverStep.Name(progress.step).removeprefix("FAILOVER_STEP_").lower()
        if as_lines:
            line = {
                "step": step,
                "message": progress.message,
                "old_primary": progress.old_primary,
                "new_primary": progress.new_primary,
                "elapsed_s": round(elapsed_s, 3),
            }
            typer.echo(as_json.dumps(line))
        else:
            out.print(f"{elapsed_s:5.1f} s  {progress.message}", soft_wrap=True, highlight=False)
