"""`memshard degrade`: the degradation level of the cluster, or of one shard, set by hand."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from cli.cluster_health import Admin, TokenFile, router_at
from cli.cluster_options import DataDir, failures_shown
from cli.options import not_empty


class LevelName(StrEnum):
    """The degradation levels, as people write them; `auto` leaves it to the routers."""

    AUTO = "auto"
    NORMAL = "normal"
    REDUCED = "reduced"
    ESSENTIAL = "essential"
    READONLY = "readonly"
    MAINTENANCE = "maintenance"


def degrade(
    level: Annotated[LevelName, typer.Argument(help="The level, or auto: each router decides by what it sees.")],
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="ID",
            callback=not_empty,
            help="One shard, like shard-0. Default: the whole cluster.",
        ),
    ] = None,
    data_dir: DataDir = None,
    admin: Admin = None,
    token_file: TokenFile = None,
) -> None:
    """Set the degradation level of the cluster or of a shard, whatever the routers see. It holds until it is changed.

    readonly refuses writes; maintenance also tells balancers to look elsewhere; normal keeps a router from giving
    anything up by itself.
    """
    from local.admin_client import set_degradation
    from local.layout import Layout
    from memshard.v1.memory_pb2 import DegradationLevel

    whose = shard or ""
    number = 0 if level is LevelName.AUTO else DegradationLevel.Value(f"DEGRADATION_LEVEL_{level.name}")
    with failures_shown():
        router = router_at(admin, token_file)
        to = router.set_degradation if router is not None else partial(set_degradation, Layout.of(data_dir))
        epoch = asyncio.run(to(whose, number))
    told = "left to the routers" if level is LevelName.AUTO else f"set to {level}"
    typer.echo(f"The degradation level of {whose or 'the cluster'} is {told}, as of epoch {epoch}.")
