"""The cluster commands of the memshard command line: up, down, status, failover, restart, rotate-secrets, degrade,
health and its kin, shards and moves, config."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli import cluster_moves, cluster_shards
from cli.cluster_degrade import degrade
from cli.cluster_failover import failover
from cli.cluster_health import health, recover, stats
from cli.cluster_options import DataDir, failures_shown
from cli.cluster_restart import restart
from cli.cluster_rotate import rotate_secrets
from cli.cluster_top import top
from cli.terminal import fail

DEFAULT_PORT = 50051
DEFAULT_HUNG_AFTER_S = 30.0


class EmbedderName(StrEnum):
    """Who turns text into embeddings."""

    LOCAL = "local"
    HTTP = "http"
    NONE = "none"


class PlacementName(StrEnum):
    """What decides where a memory goes."""

    USER_BASED = "user_based"
    CONTENT_HASH = "content_hash"
    TEMPORAL = "temporal"
    MEMORY_TYPE = "memory_type"


class ServiceName(StrEnum):
    """The services that have settings."""

    ROUTER = "router"
    SHARD = "shard"
    REPLICA = "replica"
    MOVER = "mover"


def register(app: typer.Typer) -> None:
    """Adds the cluster commands to app."""
    app.command()(up)
    app.command()(down)
    app.command()(status)
    app.command()(failover)
    app.command()(restart)
    app.command()(rotate_secrets)
    app.command()(degrade)
    app.command()(health)
    app.command()(recover)
    app.command()(stats)
    cluster_shards.register(app)
    cluster_moves.register(app)
    app.command()(top)
    config = typer.Typer(help="Write and check the settings files of the services.", no_args_is_help=True)
    config.command()(generate)
    config.command()(validate)
    app.add_typer(config, name="config")


def up(  # noqa: PLR0913, PLR0917  # One parameter for each option.
    shards: Annotated[
        int | None, typer.Option("--shards", metavar="N", help="How many shards it begins with. Default: 2.")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas",
            metavar="M",
            help="How many standbys, with a read replica each, a shard has; fixed when it is made. Default: 1.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,…",
            help="Share of each shard in the slots beside the others', like 1,2,1; fixed when it is made. Default: the "
            "same for all.",
        ),
    ] = None,
    routers: Annotated[int, typer.Option("--routers", metavar="R", help="How many routers, on ports P, P+1, …")] = 1,
    data_dir: DataDir = None,
    port: Annotated[int, typer.Option("--port", metavar="P", help="Port of the first router.")] = DEFAULT_PORT,
    embedder: Annotated[
        EmbedderName | None,
        typer.Option(
            "--embedder",
            help="Who turns text into embeddings: a small model inside (the default), an OpenAI-compatible server, "
            "or nobody: callers bring them. Fixed when it is made.",
        ),
    ] = None,
    embedder_url: Annotated[
        str | None, typer.Option("--embedder-url", metavar="URL", help="The server, like https://api.example.com/v1.")
    ] = None,
    embedder_model: Annotated[
        str | None, typer.Option("--embedder-model", metavar="NAME", help="The model to ask the server for.")
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option("--dimensions", metavar="D", help="Length of an embedding. Default: 256 with local, else 1536."),
    ] = None,
    placement: Annotated[
        PlacementName | None,
        typer.Option(
            "--placement",
            help="What decides where a memory goes. Only user_based, the default, keeps a user on one shard. "
            "Fixed when it is made.",
        ),
    ] = None,
    text_language: Annotated[
        str | None,
        typer.Option(
            "--text-language",
            metavar="NAME",
            help="Language of keyword search, as PostgreSQL names it. Fixed when it is made. Default: english.",
        ),
    ] = None,
    hung_after: Annotated[
        float,
        typer.Option(
            "--hung-after",
            metavar="SECONDS",
            min=0,
            help="How long a service or Redis may answer nothing before it is ended and started again; 0: for ever.",
        ),
    ] = DEFAULT_HUNG_AFTER_S,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is ready; it runs on.")] = False,
) -> None:
    """Start a cluster on this machine; the first time, make it. Ctrl-C stops it.

    An embedding server's key comes from the environment, as MEMSHARD_ROUTER_EMBEDDER_API_KEY.
    """
    from cli.cluster_view import Terminal
    from common.catalog import PlacementStrategy
    from local import detach as background
    from local import up as foreground
    from local.layout import Layout
    from local.record import Options

    options = Options(
        shards=shards,
        replicas=replicas,
        weights=weights,
        embedder=embedder.value if embedder else None,
        embedder_url=embedder_url,
        embedder_model=embedder_model,
        dimensions=dimensions,
        placement=PlacementStrategy(placement.value) if placement else None,
        text_language=text_language,
    )
    layout = Layout.of(data_dir)
    request = foreground.Request(layout.root, options, port, routers, hung_after)
    terminal = Terminal(layout.root, detached=detach)
    with failures_shown():
        foreground.check(request)
        terminal.starting()
        if detach:
            background.launch(request, terminal)
        else:
            asyncio.run(foreground.run(request, terminal))
            terminal.stopped()
            if not terminal.was_ready:
                raise typer.Exit(130)


def down(data_dir: DataDir = None) -> None:
    """Stop the cluster, and whatever is left of one."""
    from local.down import down as end
    from local.layout import Layout

    layout = Layout.of(data_dir)
    with failures_shown():
        outcome = asyncio.run(end(layout))
    if outcome.supervisor:
        typer.echo(f"The cluster in {layout.root} has stopped.")
    if outcome.leftovers:
        typer.echo(f"{outcome.leftovers} processes that a supervisor had left behind have been stopped.")
    if not outcome.supervisor and not outcome.leftovers:
        typer.echo(f"Nothing runs in {layout.root}.")


def status(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, data_dir: DataDir = None) -> None:
    """Show every process and shard. Exit code 1 when something is not healthy, or nothing runs."""
    from cli.cluster_view import show_status
    from local.layout import Layout
    from local.status import status as look

    with failures_shown():
        found = asyncio.run(look(Layout.of(data_dir)))
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        show_status(found)
    if not found.healthy():
        raise typer.Exit(1)


def generate(service: Annotated[ServiceName, typer.Argument(help="Whose settings.")]) -> None:
    """Print a settings file with every setting, its meaning and its default."""
    from common import config

    typer.echo(config.generate(config.SETTINGS[service.value]), nl=False)


def validate(
    service: Annotated[ServiceName, typer.Argument(help="Whose settings.")],
    file: Annotated[
        Path | None, typer.Argument(readable=False, help="The file; without one, the environment alone.")
    ] = None,
) -> None:
    """Check a service's settings: file and environment, as the service would read them."""
    from common import config

    try:
        config.load(config.SETTINGS[service.value], file)
    except config.ConfigError as error:
        fail(str(error))
    typer.echo(f"The settings of the {service.value} are valid.")
