"""What people read: tables for 80 columns that never break an id, and the words for what an answer leaves out."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

from rich import box
from rich.table import Table
from rich.text import Text

from cli.terminal import printable, printable_line
from memshard import DegradationLevel, Memory, ReadReport, SearchResult

_EXCERPT_CHARS: Final = 280
"""About five lines beside a time at 80 columns; `memshard get` shows the whole."""

_TIME_CHARS: Final = 16


def memory_table(memory: Memory) -> Table:
    """One memory, field by field, with its whole content."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    fields = {
        "id": memory.id,
        "user": memory.user_id,
        "agent": memory.agent_id,
        "session": memory.session_id,
        "type": _name(memory.type),
        "importance": "" if memory.importance is None else f"{memory.importance:g}",
        "metadata": json.dumps(memory.metadata, ensure_ascii=False) if memory.metadata else "",
        "embedding": " ".join(filter(None, (_name(memory.embedding_state), memory.embedding_model))),
        "stored": _moment(memory.create_time),
        "updated": _moment(memory.update_time) if memory.version > 1 else "",
        "expires": _moment(memory.expire_time),
        "version": str(memory.version or ""),
    }
    for name, value in fields.items():
        if value:
            table.add_row(name, Text(printable_line(value)))
    table.add_row("content", Text(printable(memory.content)))
    return table


def listing_table(memories: Iterable[Memory], *, header: bool = True) -> Table:
    """Memories with the times they were stored. The widths are fixed, so that pages can be printed one by one."""
    table = _table(header)
    table.add_column("Stored (UTC)", width=_TIME_CHARS, no_wrap=True)
    table.add_column("Memory", overflow="fold", ratio=1)
    for memory in memories:
        table.add_row(_time(memory.create_time), _summary(memory, with_user=False))
    return table


def versions_table(versions: Iterable[Memory], *, header: bool = True) -> Table:
    """Versions of one memory, each with its number and the time it was made. The widths are fixed, as in a listing."""
    table = _table(header)
    table.add_column("Since (UTC)", width=_TIME_CHARS, no_wrap=True)
    table.add_column("Version", overflow="fold", ratio=1)
    for memory in versions:
        table.add_row(_time(memory.update_time or memory.create_time), _described(f"version {memory.version}", memory))
    return table


def search_table(result: SearchResult, *, with_user: bool) -> Table:
    """Matches, best first, with their scores; `with_user` says whose each is."""
    kind = f" ({_name(result.score_kind)})" if result.score_kind else ""
    title = f"Score{kind}"
    table = _table(True)
    table.add_column(title, width=max(_TIME_CHARS, len(title)), no_wrap=True)
    table.add_column("Memory", overflow="fold", ratio=1)
    for match in result.results:
        table.add_row(f"{match.score:.4f}", _summary(match.memory, with_user=with_user))
    return table


def gaps(report: ReadReport) -> list[str]:
    """A sentence for each way in which an answer is less than it could be."""
    sentences = []
    if report.partial:
        missing = report.shards.total - report.shards.succeeded
        reasons = "; ".join(
            f"{failure.shard_id}: {failure.error} [{failure.error.reason or failure.error.code.name}]"
            for failure in report.shards.failed
        )
        sentences.append(
            f"the answer is partial: {missing} of {report.shards.total} shards did not answer"
            + (f" ({reasons})" if reasons else "")
        )
    if report.degradation_level > DegradationLevel.NORMAL:
        sentences.append(f"the service is degraded ({_name(report.degradation_level)})")
    return sentences


def _table(header: bool) -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=header, expand=True, pad_edge=False)


def _summary(memory: Memory, *, with_user: bool) -> Text:
    return _described(memory.id, memory, f"user {memory.user_id}" if with_user else "")


def _described(title: str, memory: Memory, detail: str = "") -> Text:
    content = printable_line(memory.content)
    if len(content) > _EXCERPT_CHARS:
        content = f"{content[:_EXCERPT_CHARS]}… (+{len(content) - _EXCERPT_CHARS:,} characters)"
    text = Text(printable_line(title), style="bold")
    if detail:
        text.append(f"\n{printable_line(detail)}", style="not bold dim")
    text.append(f"\n{content}", style="not bold")
    return text


def _name(value: IntEnum) -> str:
    return value.name.lower().replace("_", " ") if value else ""


def _time(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else f"{_time(moment)} UTC"
