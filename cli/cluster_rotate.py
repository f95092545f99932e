"""`memshard rotate-secrets`: new passwords everywhere."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio

import typer

from cli.cluster_options import DataDir, failures_shown


def rotate_secrets(data_dir: DataDir = None) -> None:
    """Give every PostgreSQL role, Redis and the admin service a new secret. Restart the cluster right after it.

    What runs keeps the connections that it has, and can make no new ones until then.
    """
    from local.layout import Layout
    from local.rotation import rotate

    layout = Layout.of(data_dir)
    with failures_shown():
        changed = asyncio.run(rotate(layout))
    typer.echo(f"New passwords on {', '.join(changed)}.")
    typer.echo("Now, at once: memshard down, and memshard up. The new ones are used from then on.")
