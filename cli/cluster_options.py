"""What the cluster commands share: which cluster is meant, and how their failures are shown."""

# ruff: noqa: PLC0415  # The embedded cluster is imported inside its commands: `memshard add` should not wait for it.

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cli.terminal import fail

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="MEMSHARD_DATA_DIR",
        metavar="DIR",
        readable=False,  # Said by us, with what to do.
        help="Where the cluster lives. Default: /var/lib/memshard for root, else ~/.local/share/memshard.",
    ),
]


@contextmanager
def failures_shown() -> Iterator[None]:
    """Ends the command with one line, and the log of what failed where there is one."""
    from local.errors import LocalClusterError, OptionsError, StartError

    try:
        yield
    except StartError as error:
        if error.log_tail:
            typer.echo(error.log_tail, err=True)
        fail(str(error))
    except OptionsError as error:
        fail(str(error), code=2)
    except LocalClusterError as error:
        fail(str(error))
    except OSError as error:  # Such as a directory of another user's.
        fail(f"{error.filename or 'the data directory'}: {error.strerror or error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        fail("stopped before the cluster was ready", code=130)
