"""`memshard restart`: processes one after the other, while the cluster serves."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
import json as as_json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cluster_options import DataDir, failures_shown
from cli.terminal import console

if TYPE_CHECKING:
    from local.layout import Layout


def restart(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Processes, as `memshard status` names them, in this order."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each process.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Restart processes one after the other, each when the one before is well again. The cluster goes on serving.

    A service's successor starts before it ends, and takes its port over; when it cannot start, the old one goes on, and
    the exit code is 1.
    """
    from local.layout import Layout

    if bool(names) == everything:
        raise typer.BadParameter("name the processes, or say --all")
    with failures_shown():
        asyncio.run(_follow(Layout.of(data_dir), names or (), as_lines=json))


async def _follow(layout: "Layout", names: Sequence[str], *, as_lines: bool) -> None:
    from local.admin_client import restart as steps

    out = console()
    async for progress in steps(layout, names):
        if as_lines:
            line = {"name": progress.name, "message": progress.message, "seconds": round(progress.seconds, 3)}
            typer.echo(as_json.dumps(line))
        else:
            out.print(f"{progress.seconds:5.1f} s  {progress.message}", soft_wrap=True, highlight=False)
