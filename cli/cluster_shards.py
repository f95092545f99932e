"""`memshard shards …` and `memshard rebalance`: shards come and leave, and slots move between them."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
import json as as_json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cluster_moves import Json, MaxRate, RollbackWindow, as_line, follow_moves, request_of
from cli.cluster_options import DataDir, failures_shown
from cli.options import not_empty
from cli.terminal import console, fail

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.table import Table

    from local.layout import Layout
    from memshard.admin.v1.cluster_pb2 import ListShardsResponse

_MAX_WEIGHT = 10_000

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Shard = Annotated[str, typer.Argument(metavar="SHARD", help="The shard, like shard-2.")]


class StatusName(StrEnum):
    """What a shard may be used for."""

    ACTIVE = "active"
    READONLY = "readonly"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"


def register(app: typer.Typer) -> None:
    """Adds the commands to app."""
    shards = typer.Typer(help="Show, add, drain and remove shards.", no_args_is_help=True)
    shards.command("list")(list_)
    shards.command()(add)
    shards.command()(drain)
    shards.command()(remove)
    shards.command("set")(set_)
    shards.command()(pin)
    shards.command()(unpin)
    app.add_typer(shards, name="shards")
    app.command()(rebalance)


def list_(json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show the shards: slots, weights, and what each may be used for."""
    from google.protobuf.json_format import MessageToJson

    from local.admin_client import list_shards
    from local.layout import Layout

    with failures_shown():
        found = asyncio.run(list_shards(Layout.of(data_dir)))
    if json:
        typer.echo(MessageToJson(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        return
    console().print(_table(found))


def add(
    weight: Annotated[
        int,
        typer.Option(
            "--weight", metavar="W", min=1, max=_MAX_WEIGHT, help="Its share of the slots beside the others'."
        ),
    ] = 1,
    json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Start a new shard with its standbys. It has no slots until `memshard rebalance` gives it some."""
    from local.layout import Layout
    from memshard.admin.v1.cluster_pb2 import AddShardRequest

    with failures_shown():
        asyncio.run(_follow(Layout.of(data_dir), "AddShard", AddShardRequest(weight=weight), as_lines=json))


def remove(shard: Shard, json: Json = False, data_dir: DataDir = None) -> None:
    """End a shard that has no slots any more, and remove its data. `memshard shards drain` comes before."""
    from local.layout import Layout
    from memshard.admin.v1.cluster_pb2 import RemoveShardRequest

    with failures_shown():
        asyncio.run(_follow(Layout.of(data_dir), "RemoveShard", RemoveShardRequest(shard_id=shard), as_lines=json))


def drain(
    shard: Shard,
    max_rate: MaxRate = 0,
    rollback_window: RollbackWindow = None,
    json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Move all slots off a shard while it serves; it gets none from then on. Ctrl-C ends it where it can be resumed."""
    from memshard.admin.v1.cluster_pb2 import DrainShardRequest

    request = request_of(DrainShardRequest(shard_id=shard), max_rate, rollback_window)
    follow_moves("DrainShard", request, data_dir, as_lines=json)


def rebalance(
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be moved, and move nothing.")] = False,
    max_rate: MaxRate = 0,
    rollback_window: RollbackWindow = None,
    json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Move slots, while they are served, until each shard has its share by weight. Ctrl-C ends it where it can be
    resumed, by the same command or `memshard moves resume`.
    """
    from memshard.admin.v1.cluster_pb2 import RebalanceRequest

    request = request_of(RebalanceRequest(plan_only=plan), max_rate, rollback_window)
    follow_moves("Rebalance", request, data_dir, as_lines=json)


def set_(
    shard: Shard,
    status: Annotated[
        StatusName | None, typer.Option("--status", help="What it may be used for. Default: as it is.")
    ] = None,
    weight: Annotated[
        int | None,
        typer.Option(
            "--weight", metavar="W", min=1, max=_MAX_WEIGHT, help="Its share of the slots. Default: as it is."
        ),
    ] = None,
    json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Say what a shard may be used for, and what its share of the slots is to be; `memshard rebalance` moves them."""
    from local.admin_client import set_shard
    from local.layout import Layout

    if status is None and weight is None:
        fail("say --status or --weight", code=2)
    with failures_shown():
        epoch = asyncio.run(set_shard(Layout.of(data_dir), shard, status or "", weight or 0))
    if json:
        typer.echo(as_json.dumps({"shard_id": shard, "epoch": epoch}))
        return
    typer.echo(f"{shard} is set, as of epoch {epoch}.")


User = Annotated[str, typer.Option("--user", metavar="ID", callback=not_empty, help="Whose slot.")]


def pin(
    user: User,
    shard: Annotated[str, typer.Option("--shard", metavar="ID", callback=not_empty, help="Where it is to be.")],
    json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Have a user's slot stay on a shard, whatever the weights say; `memshard rebalance` takes it there."""
    _pin(data_dir, user, shard, json=json)


def unpin(user: User, json: AsJson = False, data_dir: DataDir = None) -> None:
    """Leave a user's slot to the weights again."""
    _pin(data_dir, user, "", json=json)


def _pin(data_dir: DataDir, user: str, shard: str, *, json: bool) -> None:
    from local.admin_client import pin_user
    from local.layout import Layout

    with failures_shown():
        slot = asyncio.run(pin_user(Layout.of(data_dir), user, shard))
    if json:
        typer.echo(as_json.dumps({"slot": slot, "shard_id": shard}))
        return
    where = f"is to be on {shard}; `memshard rebalance` takes it there" if shard else "goes by the weights again"
    typer.echo(f"Slot {slot} {where}.")


async def _follow(layout: "Layout", rpc: str, request: "Message", *, as_lines: bool) -> None:
    from local.admin_client import follow

    out = console()
    async for progress in follow(layout, rpc, request):
        if as_lines:
            typer.echo(as_line(progress))
        elif progress.message:
            out.print(progress.message, soft_wrap=True)


def _table(found: "ListShardsResponse") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("shard", "status"):
        table.add_column(name)
    for name in ("weight", "slots", "share"):
        table.add_column(name, justify="right")
    table.add_column("address")
    total = sum(shard.slots for shard in found.shards) or 1
    for shard in found.shards:
        share = f"{shard.slots / total:.1%}"
        table.add_row(shard.shard_id, shard.status, str(shard.weight), f"{shard.slots:,}", share, shard.address)
    return table
