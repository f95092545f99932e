"""Text of strangers on a terminal: shown, and powerless."""

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from cli import render
from cli.documents import json_text, memory_document
from cli.terminal import describe, printable, printable_line
from memshard import (
    DegradationLevel,
    InvalidArgument,
    Memory,
    ReadReport,
    ScoredMemory,
    ScoreKind,
    SearchResult,
    ShardFailure,
    ShardSummary,
    Unavailable,
)

_ID = "0190e0a4-1234-7000-8000-123456789abc"
_HOSTILE = "\x1b[2J\x1b]0;owned\x07 [bold red]x[/] \x9b31m \u202egnp.exe \r over \U000e0041 :smile: \x7f"


def _drawn(renderable: RenderableType, width: int = 80) -> str:
    # As on a terminal with colours, so that what rich itself writes is told from what the text smuggles in.
    out = io.StringIO()
    Console(file=out, width=width, markup=False, emoji=False, highlight=False, color_system=None).print(renderable)
    return out.getvalue()


@given(st.text())
def test_nothing_printable_commands_a_terminal(text: str) -> None:
    for char in printable(text).replace("\n", "") + printable_line(text):
        assert unicodedata.category(char) not in {"Cc", "Cs", "Zl", "Zp"}
        assert char not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert "\n" not in printable_line(text)


def test_honest_text_stays_as_it_is() -> None:
    text = "Grüße, 茶 and 👩\u200d🚀 (\u0645\u06cc\u200c\u062e\u0648)\nnext line"
    assert printable(text) == text


def test_hostile_content_is_shown_harmless_in_every_table() -> None:
    memory = Memory(id=_ID, user_id=_HOSTILE, content=_HOSTILE, agent_id=_HOSTILE, metadata={_HOSTILE: _HOSTILE})
    result = SearchResult((ScoredMemory(memory, 0.5),), ScoreKind.COSINE, ReadReport())
    for table in (
        render.memory_table(memory),
        render.listing_table([memory]),
        render.search_table(result, with_user=True),
    ):
        drawn = _drawn(table)
        assert not set(drawn) & set("\x1b\x07\x9b\u202e\r\x7f\U000e0041")
        assert "\\x1b[2J" in drawn
        assert "[bold red]x[/]" in drawn
        assert ":smile:" in drawn


@pytest.mark.parametrize("width", [64, 80, 200])
def test_ids_are_never_broken(width: int) -> None:
    memory = Memory(id=_ID, user_id="u" * 256, content="word " * 500)
    result = SearchResult((ScoredMemory(memory, -0.123456),), ScoreKind.COSINE, ReadReport())
    for table in (
        render.memory_table(memory),
        render.listing_table([memory], header=False),
        render.search_table(result, with_user=True),
    ):
        drawn = _drawn(table, width)
        assert _ID in drawn
        assert max(map(len, drawn.splitlines())) <= width


def test_json_escapes_what_a_terminal_would_obey_and_loses_nothing() -> None:
    document = memory_document(Memory(id=_ID, user_id="茶", content=_HOSTILE))
    text = json_text(document)
    assert json.loads(text) == document
    assert not set(text) & set("\x1b\x07\x9b\u202e\r\x7f\U000e0041")


def test_gaps_of_an_answer_are_put_in_words() -> None:
    shards = ShardSummary(3, 2, (ShardFailure("shard-2", Unavailable("no route", reason="UNAVAILABLE")),))
    partial, degraded = render.gaps(ReadReport(("primary",), shards, DegradationLevel.REDUCED))
    assert partial == "the answer is partial: 1 of 3 shards did not answer (shard-2: no route [UNAVAILABLE])"
    assert "reduced" in degraded
    assert render.gaps(ReadReport((), ShardSummary(3, 3), DegradationLevel.NORMAL)) == []


def test_failures_say_what_to_do() -> None:
    nobody = describe(Unavailable("failed to connect to all addresses: Connection refused (111)"), "localhost:1")
    assert "localhost:1" in nobody
    assert "`memshard up`" in nobody
    spoken = describe(Unavailable("shard-2 is down", reason="UNAVAILABLE"), "localhost:1")
    assert spoken == "shard-2 is down [UNAVAILABLE]"
    assert describe(InvalidArgument("is bad"), "localhost:1") == "is bad [INVALID_ARGUMENT]"
