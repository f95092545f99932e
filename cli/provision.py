"""`memshard database prepare`, `memshard catalog create`: a cluster on PostgreSQL servers that others run."""

# ruff: noqa: PLC0415  # What talks to databases is imported inside: `memshard add` should not wait for it.

import asyncio
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cluster_catalog import rebuild
from cli.terminal import fail

if TYPE_CHECKING:
    from common.provision import Logins


class DatabaseKind(StrEnum):
    """What a database is for."""

    CATALOG = "catalog"
    SHARD = "shard"


_HIDDEN = "Holds a password: better in the environment than on the command line."

AdminDsn = Annotated[
    str,
    typer.Option(
        "--admin-dsn",
        envvar="MEMSHARD_ADMIN_DSN",
        metavar="URL",
        help=f"The server, as a superuser, and any database of it. {_HIDDEN}",
    ),
]
OwnerPassword = Annotated[
    Path | None,
    typer.Option(
        "--owner-password-file",
        metavar="FILE",
        readable=False,
        help="Password of memshard_owner; without, MEMSHARD_OWNER_PASSWORD.",
    ),
]
AppPassword = Annotated[
    Path | None,
    typer.Option(
        "--app-password-file",
        metavar="FILE",
        readable=False,
        help="Password of memshard_app; without, MEMSHARD_APP_PASSWORD.",
    ),
]
ReplicationPassword = Annotated[
    Path | None,
    typer.Option(
        "--replication-password-file",
        metavar="FILE",
        readable=False,
        help="Password of memshard_replication, which standbys stream as; without, MEMSHARD_REPLICATION_PASSWORD. "
        "Without either there is no such role.",
    ),
]
MoverPassword = Annotated[
    Path | None,
    typer.Option(
        "--mover-password-file",
        metavar="FILE",
        readable=False,
        help="Password of memshard_mover, which slots are moved as; without, MEMSHARD_MOVER_PASSWORD. "
        "Without either there is no such role.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to app."""
    database = typer.Typer(help="Prepare PostgreSQL servers of your own.", no_args_is_help=True)
    database.command("prepare")(prepare)
    app.add_typer(database, name="database")
    catalog = typer.Typer(help="Make the catalog of a cluster of your own, or a lost one again.", no_args_is_help=True)
    catalog.command("create")(create)
    catalog.command("rebuild")(rebuild)
    app.add_typer(catalog, name="catalog")


def prepare(
    kind: Annotated[DatabaseKind, typer.Argument(help="What the server is for.")],
    admin_dsn: AdminDsn,
    owner_password_file: OwnerPassword = None,
    app_password_file: AppPassword = None,
    mover_password_file: MoverPassword = None,
    replication_password_file: ReplicationPassword = None,
) -> None:
    """Make roles and database on a server, or bring them up to date: passwords become those that are given.

    On a shard's primary; its standbys have it from there.
    """
    from common.provision import Logins
    from common.roles import APP, MOVER, OWNER, REPLICATION, Login

    mover = _password(mover_password_file, "mover")
    replication = _password(replication_password_file, "replication")
    logins = Logins(
        owner=Login(OWNER, _required(owner_password_file, "owner")),
        app=Login(APP, _required(app_password_file, "app")),
        mover=Login(MOVER, mover) if mover else None,
        replication=Login(REPLICATION, replication) if replication else None,
    )
    asyncio.run(_prepare(kind, admin_dsn, logins))
    typer.echo(f"The database of the {kind} is ready.")


def create(
    description: Annotated[Path, typer.Argument(readable=False, help="YAML file that describes the cluster.")],
    catalog_dsn: Annotated[
        str,
        typer.Option(
            "--catalog-dsn",
            envvar="MEMSHARD_CATALOG_DSN",
            metavar="URL",
            help=f"The catalog's database, as memshard_owner. {_HIDDEN}",
        ),
    ],
) -> None:
    """Make the catalog of a cluster; of one that is there, bring the addresses up to date. It may be run again."""
    from asyncpg import PostgresError

    from common.catalog import CatalogError
    from common.migrations import NewerSchemaError
    from common.postgres import DatabaseUnreachableError
    from common.provision import DescriptionError, provision_catalog, read_description

    try:
        described = read_description(description)
        outcome = asyncio.run(provision_catalog(catalog_dsn, described))
    except (DescriptionError, DatabaseUnreachableError, CatalogError, NewerSchemaError, PostgresError) as error:
        fail(str(error))
    what = "has been made" if outcome.made else "was there"
    typer.echo(f"The catalog of cluster {outcome.cluster_id} {what}; epoch {outcome.epoch}.")
    for shard_id in outcome.told:
        typer.echo(f"{shard_id}: its address or its replicas have changed.")
    for shard_id in outcome.missing:
        typer.echo(f"{shard_id} is not of this cluster yet: `memshard shards add` gives it slots.")


async def _prepare(kind: DatabaseKind, admin_dsn: str, logins: "Logins") -> None:
    from asyncpg import PostgresError

    from common import postgres, provision, roles

    name = roles.CATALOG_DATABASE if kind is DatabaseKind.CATALOG else roles.SHARD_DATABASE
    try:
        server = await postgres.connect(admin_dsn, what="the server")
        try:
            if kind is DatabaseKind.CATALOG:
                await provision.prepare_catalog_server(server, logins)
            else:
                await provision.prepare_shard_server(server, logins)
        finally:
            await server.close()
        database = await postgres.connect(admin_dsn, what="the new database", database=name)
        try:
            if kind is DatabaseKind.CATALOG:
                await provision.prepare_catalog_database(database)
            else:
                await provision.prepare_shard_database(database)
        finally:
            await database.close()
    except (postgres.DatabaseUnreachableError, PostgresError) as error:
        fail(str(error))


def _required(file: Path | None, whose: str) -> str:
    return _password(file, whose) or fail(
        f"--{whose}-password-file, or MEMSHARD_{whose.upper()}_PASSWORD in the environment, is required"
    )


def _password(file: Path | None, whose: str) -> str:
    """From the file, else from the environment; empty when it is in neither."""
    if file is None:
        return os.environ.get(f"MEMSHARD_{whose.upper()}_PASSWORD", "")
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: {getattr(error, 'strerror', None) or 'is no text'}")
    return password or fail(f"{file} is empty")
