"""`memshard health | recover | stats`: how the routers find everything, what may help, and what they count."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
import json as as_json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cli.cluster_options import DataDir, failures_shown

if TYPE_CHECKING:
    from local.errors import LocalClusterError
    from local.router_admin import RouterAdmin

R = TypeVar("R")

Admin = Annotated[
    str | None,
    typer.Option("--admin", metavar="HOST:PORT", help="The admin port of a router that no data directory tells of."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", readable=False, help="The token that --admin asks for."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def health(
    detailed: Annotated[bool, typer.Option("--detailed", help="Every check, not only what is wrong.")] = False,
    json: AsJson = False,
    data_dir: DataDir = None,
    admin: Admin = None,
    token_file: TokenFile = None,
) -> None:
    """Show how each router finds everything that it needs. Exit code 0 when all is healthy, else 1."""
    from cli.cluster_health_view import health_document, show_health

    answers = _ask_each(data_dir, admin, token_file, lambda router: router.health(fresh=False))
    document = health_document(answers, everything=detailed)
    if json:
        typer.echo(as_json.dumps(document, indent=2))
    else:
        show_health(document)
    if document["overall"] != "healthy":
        raise typer.Exit(1)


def recover(
    test_after: Annotated[
        bool, typer.Option("--test-after", help="Look at everything again afterwards; exit code 1 unless healthy.")
    ] = False,
    json: AsJson = False,
    data_dir: DataDir = None,
    admin: Admin = None,
    token_file: TokenFile = None,
) -> None:
    """Have each router try what may help against what it finds wrong: new connections, an empty cache.

    No action is tried twice within a minute on the same thing. Exit code 1 when a router does not answer.
    """
    from cli.cluster_health_view import recovery_document, show_recovery

    answers = _ask_each(data_dir, admin, token_file, lambda router: router.recover(test_after=test_after))
    document = recovery_document(answers)
    if json:
        typer.echo(as_json.dumps(document, indent=2))
    else:
        show_recovery(document)
    unwell = any(router.get("after", {}).get("overall", "healthy") != "healthy" for router in document["routers"])
    if unwell or any("error" in router for router in document["routers"]):
        raise typer.Exit(1)


def stats(
    json: AsJson = False,
    data_dir: DataDir = None,
    admin: Admin = None,
    token_file: TokenFile = None,
) -> None:
    """Show what each router counts: breakers, levels and what they are decided from, limits, budgets, its cache."""
    from cli.cluster_health_view import show_stats, stats_document

    answers = _ask_each(data_dir, admin, token_file, lambda router: router.stats())
    document = stats_document(answers)
    if json:
        typer.echo(as_json.dumps(document, indent=2))
    else:
        show_stats(document)
    if any("error" in router for router in document["routers"]):
        raise typer.Exit(1)


def _ask_each(
    data_dir: Path | None,
    admin: str | None,
    token_file: Path | None,
    ask: "Callable[[RouterAdmin], Coroutine[Any, Any, R]]",
) -> "list[tuple[RouterAdmin, R | LocalClusterError]]":
    from local import router_admin

    with failures_shown():
        routers = chosen_routers(data_dir, admin, token_file)
        return asyncio.run(router_admin.of_each(routers, ask))


def chosen_routers(data_dir: Path | None, admin: str | None, token_file: Path | None) -> "list[RouterAdmin]":
    """The routers that are meant. Raises LocalClusterError, typer.BadParameter."""
    from local import router_admin
    from local.layout import Layout

    router = router_at(admin, token_file)
    return [router] if router is not None else router_admin.of_cluster(Layout.of(data_dir))


def router_at(admin: str | None, token_file: Path | None) -> "RouterAdmin | None":
    """The router that the options name, if they do. Raises LocalClusterError, typer.BadParameter."""
    from local import router_admin

    if (admin is None) != (token_file is None):
        raise typer.BadParameter("--admin and --token-file go together")
    return None if admin is None or token_file is None else router_admin.at(admin, token_file)
