"""What the runbooks have people type is what the commands take, as their own help has it: it is parsed, and not run.

docs/runbooks/README.md says which of it a test also does.
"""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
import typer.main

from cli.main import app
from common.config import MoverSettings
from shard import mover

_DOCS = Path(__file__).resolve().parents[3] / "docs"
RUNBOOKS = _DOCS / "runbooks"
_INDEX = RUNBOOKS / "README.md"
PAGES = [*sorted(page for page in RUNBOOKS.glob("*.md") if page != _INDEX), _DOCS / "moves.md"]
_BLOCK = re.compile(r"^ *```(sh|text)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# Before what people type, where what is printed is shown as well.
_PROMPT = "$ "
# What typer refuses a command line with.
_REFUSED = typer.BadParameter.__mro__[1]
_MOVER = ["python", "-m", "shard.mover"]
_ASSIGNED = re.compile(r"([A-Z][A-Z_]*)=(.*)", re.DOTALL)


def commands_of(page: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The commands of a page, each with the variables that it would find set."""
    exported: dict[str, str] = {}
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        if language == "text" or any(line.startswith(_PROMPT) for line in lines):
            lines = [line.removeprefix(_PROMPT) for line in lines if line.startswith(_PROMPT)]
        for line in lines:
            for command in line.split("; "):
                words = shlex.split(command, comments=True)
                if words[:1] == ["export"]:
                    exported |= {match[1]: match[2] for word in words[1:] if (match := _ASSIGNED.fullmatch(word))}
                    continue
                mine: dict[str, str] = {}
                while words and (match := _ASSIGNED.fullmatch(words[0])):
                    mine[match[1]] = match[2]
                    words.pop(0)
                if words[:1] == ["memshard"] or words[:3] == _MOVER:
                    yield words, exported | mine


def check(words: list[str], environment: dict[str, str]) -> None:
    """Raises for whatever the command does not understand."""
    with patch.dict(os.environ, environment):
        if words[:3] == _MOVER:
            mover.arguments_of(words[3:])
            return
        command: Any = typer.main.get_command(app)
        context, rest = None, words[1:]
        while hasattr(command, "commands"):
            context = command.make_context(command.name or "", [rest[0]], parent=context)
            command = command.commands[rest.pop(0)]
        command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_has_people_type_is_what_the_commands_take(page: Path) -> None:
    found = list(commands_of(page))
    assert found
    for words, environment in found:
        # Where a page says that the rest is up to the reader.
        if "…" not in words:
            check(words, environment)


def test_the_index_has_every_page_and_names_tests_that_there_are() -> None:
    index = _INDEX.read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == sorted(p.name for p in PAGES if p.parent == RUNBOOKS)
    named = re.findall(r"`(tests/[a-z_/]+\.py)`", index)
    assert named
    assert [name for name in named if not (_DOCS.parent / name).exists()] == []


def test_a_slip_in_a_page_is_seen() -> None:
    check(["memshard", "moves", "rollback", "7"], {})
    for slip in (["memshard", "moves", "rollback"], ["memshard", "rebalance", "--max-speed", "7"]):
        with pytest.raises(_REFUSED):
            check(slip, {})
    with pytest.raises(SystemExit):
        check([*_MOVER, "rebuild"], {})


def test_a_lost_catalog_is_made_again_elsewhere_with_all_the_settings_that_it_takes() -> None:
    page = next(page for page in PAGES if page.stem == "bring-back-a-lost-catalog")
    ((words, environment),) = [(words, known) for words, known in commands_of(page) if words[3:4] == ["rebuild"]]
    given = mover.arguments_of(words[3:])
    with patch.dict(os.environ, {name: value.replace("…", "s3cret") for name, value in environment.items()}):
        settings = MoverSettings()  # type: ignore[call-arg]  # From the environment.
    for shard_id, _ in given.shard:
        assert f"postgres-{shard_id}:5432" in settings.shard_dsn(shard_id)
    assert {name.partition("/")[0] for name, _ in given.replica} == {shard_id for shard_id, _ in given.shard}
