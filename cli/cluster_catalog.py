"""`memshard catalog rebuild`: a lost catalog, made again from the shards."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio

import typer

from cli.cluster_options import DataDir, failures_shown


def rebuild(data_dir: DataDir = None) -> None:
    """Make the catalog of a stopped cluster again from what its shards say: who they are, and who has which slots.

    Weights are 1 afterwards, pins and degradation levels gone, and consistency tokens from before refused.
    """
    from local.catalog_rebuild import rebuild
    from local.layout import Layout

    with failures_shown():
        epoch = asyncio.run(rebuild(Layout.of(data_dir), lambda line: typer.echo(f"  {line}")))
    typer.echo(f"The catalog is made again, at epoch {epoch}. `memshard up` starts the cluster with it.")
