"""docs/api.md says what the contract says, and names every reason that a caller can meet."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = _ROOT / "docs" / "api.md"
# Reasons of the internal service; routers never hand them on. INTERNAL is a bug, which has no row.
_INTERNAL = {"WRONG_SHARD", "BAD_ROUTE", "REPLICA_BEHIND", "INTERNAL"}
# Of the health monitor, which answers operators and no agents.
_MONITOR = {"WRONG_ANSWER", "CATALOG_UNAVAILABLE", "REDIS_UNAVAILABLE"}
# What the general classes say when nothing more is known: "the code again".
_GENERAL = {"INVALID_REQUEST", "FAILED_PRECONDITION", "ABORTED", "UNAVAILABLE"}


def test_the_page_is_what_the_contract_makes_of_it_today(tmp_path: Path) -> None:
    made = tmp_path / "api.md"
    subprocess.run([sys.executable, _ROOT / "docs" / "generate_api.py", made], check=True, timeout=60)
    assert made.read_text(encoding="utf-8") == _PAGE.read_text(encoding="utf-8"), "out of date: run `make docs`"


def test_every_reason_that_is_raised_is_on_the_page() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    raised = {reason for path in _sources() for reason in _reasons(path)}
    assert {"ID_TAKEN", "INVALID_CONTENT", "BAD_PAGE_TOKEN", "SHARDS_MISSING"} <= raised, "the search for them is lost"
    missing = sorted(reason for reason in raised - _INTERNAL - _MONITOR - _GENERAL if f"`{reason}`" not in page)
    assert missing == [], "add them to docs/api_errors.md and run `make docs`"


def test_every_reason_on_the_page_is_one_of_the_code() -> None:
    text = (_ROOT / "docs" / "api_errors.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", text)) - {code.name for code in grpc.StatusCode}
    known = {
        node.value
        for path in _sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert sorted(named - known) == []


def _sources() -> Iterator[Path]:
    for folder in ("common", "router", "shard", "replica"):
        yield from (_ROOT / folder).rglob("*.py")


def _reasons(path: Path) -> Iterator[str]:
    """What stands where this project writes reasons: `reason=`, `default_reason =`, and beside the field's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.keyword(arg="reason", value=value):
                yield from _text(value)
            case ast.Assign(targets=[ast.Name("default_reason")], value=value):
                yield from _text(value)
            case ast.Call(func=ast.Name("bad") | ast.Attribute(attr="bad" | "field"), args=[_, value, *_]):
                yield from _text(value)


def _text(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isupper():
        yield node.value
