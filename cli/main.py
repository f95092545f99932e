"""The memshard command: `memshard up` and its kin run a cluster, the others work with what is in one."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

# Before grpc is imported, which the clients do before `local` is: `memshard up` starts processes, and gRPC would
# complain about each in between its lines.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import typer

from cli import changes, cluster, data, data_import, load, provision

app = typer.Typer(
    name="memshard",
    help="A sharded memory cluster for AI agents.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A traceback with local variables would print users' memories.
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memshard {version('memshard-server')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that cannot show a character must not end the command.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


cluster.register(app)
data.register(app)
changes.register(app)
data_import.register(app)
provision.register(app)
load.register(app)
