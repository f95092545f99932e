"""The commands for memories: add, get, search, list, delete."""

import sys
from typing import Annotated, Any

import typer

from cli import documents, render
from cli.conditions import Conditions, all_of
from cli.options import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_S,
    Address,
    Json,
    MaxStaleness,
    ModeName,
    Read,
    ReadName,
    Timeout,
    TypeName,
    User,
    not_empty,
    parse_expiry,
    parse_metadata,
    staleness,
)
from cli.terminal import console, describe, fail, failures_in_one_line, printable_line, warn
from memshard import DeadlineExceeded, MemoryClient, OutcomeUnknown, StoreResult, new_id

_MAX_STDIN_BYTES = 1024 * 1024
"""Far above what the service takes as content (64 KiB): its refusal is better than this command's memory filling up."""

_PAGE_SIZE = 200
"""Memories fetched at once: 12 MiB at the very most."""

OneUser = Annotated[
    str | None, typer.Option("--user", "-u", callback=not_empty, help="Whose memories; all users' when left out.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to app."""
    app.command("add")(add)
    app.command("get")(get)
    app.command("search")(search)
    app.command("list")(list_)
    app.command("delete")(delete)


def add(  # noqa: PLR0913 - Each argument is an option of the command.
    user: User,
    text: Annotated[str | None, typer.Argument(help="What to remember; - or nothing reads standard input.")] = None,
    *,
    memory_id: Annotated[str | None, typer.Option("--id", help="A UUID; one is made when left out.")] = None,
    agent: Annotated[str, typer.Option(help="Which agent remembers it.")] = "",
    session: Annotated[str, typer.Option(help="In which session.")] = "",
    type_name: Annotated[
        TypeName, typer.Option("--type", case_sensitive=False, help="What kind of memory.")
    ] = TypeName.EPISODIC,
    metadata: Annotated[
        Any, typer.Option(parser=parse_metadata, metavar="JSON", help="A JSON object to keep with it.")
    ] = None,
    importance: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    expires: Annotated[
        Any, typer.Option(parser=parse_expiry, metavar="WHEN", help="7d, 12h, or 2030-01-31T12:00:00Z.")
    ] = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Store a memory."""
    content = _content(text)
    memory_id = memory_id or new_id()
    with failures_in_one_line(address), MemoryClient(address, timeout_s=timeout) as client:
        try:
            result = client.store(
                user,
                content,
                id=memory_id,
                agent_id=agent,
                session_id=session,
                type=type_name.memory_type,
                metadata=metadata,
                importance=importance,
                expire_time=expires,
            )
        except (OutcomeUnknown, DeadlineExceeded) as error:
            fail(f"{describe(error, address)} It may have been stored: the same with --id {memory_id} settles it.")
    _refuse_deleted(result)
    if as_json:
        typer.echo(documents.json_text(documents.store_document(result)))
    else:
        typer.echo(f"Stored {printable_line(result.memory.id)}")


def _refuse_deleted(result: StoreResult) -> None:
    """A repeated store is a success, even of what has been deleted since; to say "stored" of that would be a lie."""
    if result.deleted:
        fail(f"{result.memory.id} was deleted within the last 24 hours and is not stored again. Leave out --id.")


def get(
    memory_id: Annotated[str, typer.Argument(metavar="ID")],
    user: OneUser = None,
    read: Read = ReadName.STRONG,
    max_staleness_s: MaxStaleness = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Show one memory."""
    with failures_in_one_line(address), _reader(address, timeout, read, max_staleness_s) as client:
        memory = client.get(memory_id, user_id=user)
    if as_json:
        typer.echo(documents.json_text(documents.memory_document(memory)))
    else:
        console().print(render.memory_table(memory))


def search(  # noqa: PLR0913, PLR0917 - Each argument is an option of the command.
    query: Annotated[str, typer.Argument(help="What to look for.")],
    user: OneUser = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many at most.")] = 10,
    mode: Annotated[ModeName, typer.Option(case_sensitive=False, help="By meaning, or by words.")] = ModeName.SEMANTIC,
    conditions: Conditions = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out what scores less.")] = None,
    require_all_shards: Annotated[
        bool, typer.Option("--require-all-shards", help="Fail rather than leave out a shard.")
    ] = False,
    read: Read = ReadName.STRONG,
    max_staleness_s: MaxStaleness = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Find the memories nearest to a text, or that hold its words."""
    with failures_in_one_line(address), _reader(address, timeout, read, max_staleness_s) as client:
        result = client.search(
            query,
            user_id=user,
            limit=limit,
            filter=all_of(conditions),
            mode=mode.search_mode,
            min_score=min_score,
            require_all_shards=require_all_shards,
        )
    for gap in render.gaps(result.report):
        warn(gap)
    if as_json:
        typer.echo(documents.json_text(documents.search_document(result)))
    elif result.results:
        console().print(render.search_table(result, with_user=user is None))
    else:
        typer.echo("Nothing found on the shards that answered." if result.report.partial else "Nothing found.")


def list_(  # noqa: PLR0913, PLR0917 - Each argument is an option of the command.
    user: User,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="How many at most; 50 if left out.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="List all of them.")] = False,
    conditions: Conditions = None,
    read: Read = ReadName.STRONG,
    max_staleness_s: MaxStaleness = None,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List a user's memories, newest first."""
    if all_ and limit is not None:
        raise typer.BadParameter("--limit and --all exclude each other")
    left = sys.maxsize if all_ else limit or 50
    wanted = all_of(conditions)
    token, shown, partial, warned = "", 0, False, set[str]()
    output = console()
    with failures_in_one_line(address), _reader(address, timeout, read, max_staleness_s) as client:
        while True:  # Page by page, so that a listing of any length is printed as it comes.
            page = client.list_memories(user, filter=wanted, page_size=min(left, _PAGE_SIZE), page_token=token)
            partial = partial or page.report.partial
            for gap in render.gaps(page.report):
                if gap not in warned:
                    warned.add(gap)
                    warn(gap)
            if as_json:
                for memory in page.memories:
                    typer.echo(("[" if not shown else ",") + documents.json_text(documents.memory_document(memory)))
                    shown += 1
            elif page.memories:
                output.print(render.listing_table(page.memories, header=not shown))
                shown += len(page.memories)
            left -= len(page.memories)
            token = page.next_page_token
            if not token or left <= 0:
                break
    if as_json:
        typer.echo("]" if shown else "[]")
    elif not shown:
        name = printable_line(user)
        such = " that meet the filter" if conditions else ""
        answered = " on the shards that answered" if partial else ""
        typer.echo(f"{name} has no memories{such}{answered}.")
    if token:
        typer.echo(f"There are more than these {shown:,}: --all lists them.", err=True)


def delete(
    memory_id: Annotated[str, typer.Argument(metavar="ID")],
    user: User,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Delete one memory."""
    with failures_in_one_line(address), MemoryClient(address, timeout_s=timeout) as client:
        result = client.delete(user, memory_id)
    if as_json:
        typer.echo(documents.json_text(documents.delete_document(user, memory_id, result)))
    elif result:
        typer.echo(f"Deleted {printable_line(memory_id)}")
    else:
        typer.echo(f"Nothing to delete: {printable_line(user)} has no memory {printable_line(memory_id)}")


def _reader(address: str, timeout_s: float, read: ReadName, max_staleness_s: float | None) -> MemoryClient:
    bound_s = staleness(read, max_staleness_s)
    return MemoryClient(address, timeout_s=timeout_s, read=read.read_level, max_staleness_s=bound_s)


def _content(text: str | None) -> str:
    """The text itself, or what standard input holds, without the line break that ends it."""
    if text is not None and text != "-":
        return text
    if text is None and sys.stdin.isatty():
        raise typer.BadParameter("say what to remember, or pipe it in", param_hint="TEXT")
    data = sys.stdin.buffer.read(_MAX_STDIN_BYTES + 1)
    if len(data) > _MAX_STDIN_BYTES:
        fail("content: standard input holds more than 1 MiB")
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"content: standard input is not UTF-8: {error.reason} at byte {error.start}")
    content = content.removesuffix("\n").removesuffix("\r")
    return content or fail("content: standard input is empty")
