"""The commands for what becomes of memories: update, versions, erase."""

import sys
from typing import Annotated, Any

import typer

from cli import documents, render
from cli.options import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Address,
    Json,
    Timeout,
    TypeName,
    User,
    parse_expiry,
    parse_metadata,
)
from cli.terminal import console, describe, fail, failures_in_one_line, printable_line
from memshard import UNSET, DeadlineExceeded, MemoryClient, OutcomeUnknown, new_id

_NEVER = "never"
_PAGE_SIZE = 100
"""Versions fetched at once: 10 MiB at the very most."""

RequestId = Annotated[
    str | None, typer.Option("--request-id", help="That of a try whose outcome is unknown: it has one effect.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to app."""
    app.command("update")(update)
    app.command("versions")(versions)
    app.command("erase")(erase)


def _parse_new_expiry(text: str) -> Any:
    return _NEVER if text == _NEVER else parse_expiry(text)


def update(  # noqa: PLR0913 - Each argument is an option of the command.
    memory_id: Annotated[str, typer.Argument(metavar="ID")],
    user: User,
    *,
    content: Annotated[str | None, typer.Option(help="The new text.")] = None,
    metadata: Annotated[
        Any, typer.Option(parser=parse_metadata, metavar="JSON", help="A JSON object in place of the one there is.")
    ] = None,
    importance: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    type_name: Annotated[
        TypeName | None, typer.Option("--type", case_sensitive=False, help="What kind of memory.")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="Which agent remembers it.")] = None,
    session: Annotated[str | None, typer.Option(help="In which session.")] = None,
    expires: Annotated[
        Any, typer.Option(parser=_parse_new_expiry, metavar="WHEN", help="7d, 2030-01-31T12:00:00Z, or never.")
    ] = None,
    expected_version: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Change nothing unless the memory is at this version.")
    ] = None,
    request_id: RequestId = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Change one memory; what is not named stays as it is."""
    given = (content, metadata, importance, type_name, agent, session, expires)
    if all(value is None for value in given):
        raise typer.BadParameter("name at least one thing to change, such as --content")
    request_id = request_id or new_id()
    with failures_in_one_line(address), MemoryClient(address, timeout_s=timeout) as client:
        try:
            result = client.update(
                user,
                memory_id,
                content=UNSET if content is None else content,
                metadata=UNSET if metadata is None else metadata,
                importance=UNSET if importance is None else importance,
                type=UNSET if type_name is None else type_name.memory_type,
                agent_id=UNSET if agent is None else agent,
                session_id=UNSET if session is None else session,
                expire_time=UNSET if expires is None else None if expires == _NEVER else expires,
                expected_version=expected_version,
                request_id=request_id,
            )
        except (OutcomeUnknown, DeadlineExceeded) as error:
            fail(
                f"{describe(error, address)} It may have been changed: the same with --request-id {request_id} "
                "settles it."
            )
    if as_json:
        typer.echo(documents.json_text(documents.store_document(result)))
    else:
        typer.echo(f"Updated {printable_line(result.memory.id)} to version {result.memory.version}")


def versions(
    memory_id: Annotated[str, typer.Argument(metavar="ID")],
    user: User,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List the kept versions of one memory, newest first."""
    token, shown = "", 0
    output = console()
    with failures_in_one_line(address), MemoryClient(address, timeout_s=timeout) as client:
        while True:  # Page by page, so that a history of any length is printed as it comes.
            page = client.list_versions(user, memory_id, page_size=_PAGE_SIZE, page_token=token)
            if as_json:
                for number, memory in enumerate(page.versions, start=shown):
                    typer.echo((",", "[")[not number] + documents.json_text(documents.memory_document(memory)))
            elif page.versions:
                output.print(render.versions_table(page.versions, header=not shown))
            shown += len(page.versions)
            token = page.next_page_token
            if not token:
                break
    if as_json:
        typer.echo("]" if shown else "[]")
    elif not shown:
        typer.echo(f"{printable_line(user)} has no versions of a memory {printable_line(memory_id)}")


def erase(
    user: User,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    request_id: RequestId = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Erase all that is held of a user, for good."""
    if not yes:
        if not _at_a_terminal():
            raise typer.BadParameter("there is no terminal to ask at: say that you mean it", param_hint="--yes")
        typer.confirm(f"Erase every memory of {printable_line(user)}, for good?", abort=True, err=True)
    request_id = request_id or new_id()
    with failures_in_one_line(address), MemoryClient(address, timeout_s=timeout) as client:
        try:
            result = client.erase_user(user, request_id=request_id)
        except (OutcomeUnknown, DeadlineExceeded) as error:
            fail(
                f"{describe(error, address)} Some or all may have been erased: the same with "
                f"--request-id {request_id} settles it."
            )
    if as_json:
        typer.echo(documents.json_text(documents.erase_document(user, result)))
    else:
        typer.echo(
            f"Erased {printable_line(user)}: memories {result.memories_erased:,}, "
            f"earlier versions {result.versions_erased:,}"
        )


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()
