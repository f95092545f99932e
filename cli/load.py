"""The load command: a profile's calls, made by several processes, and what became of them."""

# ruff: noqa: PLC0415  # The load generator is imported inside the command: `memshard add` should not wait for it.

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.documents import json_text
from cli.options import DEFAULT_ADDRESS, Address, Json
from cli.terminal import fail


class ClientName(StrEnum):
    """Who makes the calls."""

    SDK = "sdk"
    STUB = "stub"


def register(app: typer.Typer) -> None:
    """Adds the command to app."""
    app.command()(load)


def load(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="A YAML file, or a profile that comes with memshard: agents.")
    ],
    client: Annotated[
        ClientName, typer.Option("--client", help="The Python client, or the generated stubs alone.")
    ] = ClientName.SDK,
    duration: Annotated[
        float | None, typer.Option("--duration", min=0.001, metavar="SECONDS", help="Instead of the profile's.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0.001, metavar="CALLS", help="Calls a second, instead of its own.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, metavar="N", help="Callers at once, instead of its own.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, max=64, metavar="N", help="That make the calls.")
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare/--no-prepare", help="Store first what the profile's reads are to find.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the report there.")
    ] = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Make calls as a profile says, and tell how long they took.

    Latency is counted from when a call was due. Ctrl-C ends it early, with a report. Exit code 1: a limit of the
    profile does not hold, or nothing was answered.
    """
    from loadtest import engine, report
    from loadtest.profile import ProfileError, parse
    from loadtest.profile import load as read

    try:
        chosen = read(profile)
        given = {"duration_s": duration, "rate": rate, "concurrency": concurrency, "processes": processes}
        overrides = {name: value for name, value in given.items() if value is not None}
        chosen = parse({**chosen.model_dump(mode="json"), **overrides}, profile)
    except ProfileError as error:
        fail(str(error), code=2)
    try:
        outcome = asyncio.run(
            engine.run(
                chosen, address, client.value, prepare=prepare, tell=lambda text: typer.echo(f"{text} …", err=True)
            )
        )
    except engine.LoadError as error:
        fail(f"{address}: {error}")
    text = json_text(report.document(outcome)) if as_json else report.text(outcome).rstrip("\n")
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
    if report.exceeded(outcome) or (outcome.end == "normal" and not outcome.tally.all().latency.count):
        raise typer.Exit(1)
