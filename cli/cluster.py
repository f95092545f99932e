"""The cluster commands of the memshard command line: up, down, status, config."""

import typer


def register(app: typer.Typer) -> None:
    """Adds the cluster commands to app."""
