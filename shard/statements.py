"""What a statement does, in the few words that a metric or a span may have: never its text or its parameters."""

import re
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from common import tracing
from common.telemetry.instruments import Histogram
from common.telemetry.registry import STATEMENTS
from common.tracing import Kind, Value

T = TypeVar("T")

# A change, wherever it is among the parts of a statement; a row lock is none.
_CHANGE = re.compile(r"\b(?<!FOR )(INSERT INTO|UPDATE|DELETE FROM)\s+(?:ONLY\s+)?([a-z_]+)", re.IGNORECASE)
_DEFINITION = re.compile(r"^\s*(CREATE|DROP) INDEX\b", re.IGNORECASE)
_TABLE = re.compile(
    r"\bFROM (memories|memory_versions|claims|request_claims|applied_requests|owned_slots|heartbeats|erased_ids)\b",
    re.IGNORECASE,
)

# The statements of this project are fewer; those that are put together from a filter are many, and mean few things.
_MOST_TEXTS = 1000
_MOST_SUMMARIES = 60
_OTHER = "other"
_OWNERSHIP = "owned_slots"


@dataclass(frozen=True, slots=True)
class _Observed:
    """What is noted of all statements that do the same."""

    summary: str
    attributes: dict[str, Value]
    duration: Histogram

    @classmethod
    def of(cls, summary: str) -> "_Observed":
        operation, _, table = summary.partition(" ")
        attributes: dict[str, Value] = {
            "db.system.name": "postgresql",
            "db.operation.name": operation,
            "db.collection.name": table,
            "db.query.summary": summary,
        }
        return cls(summary, attributes, STATEMENTS.labels(summary))


_by_summary: dict[str, _Observed] = {}
_by_text: dict[str, _Observed] = {}


def summary(statement: str) -> str:
    """Like `INSERT memories` (OpenTelemetry's db.query.summary); `SELECT` where no table says more."""
    if change := _CHANGE.search(statement):
        return f"{change[1].split()[0].upper()} {change[2].lower()}"
    if definition := _DEFINITION.match(statement):
        return f"{definition[1].upper()} INDEX"
    tables = [table.lower() for table in _TABLE.findall(statement)]
    # Nearly every statement asks for ownership as well as for what it is about.
    about = next((table for table in tables if table != _OWNERSHIP), tables[0] if tables else "")
    return f"SELECT {about}".rstrip()


async def observed(statement: str, work: Awaitable[T]) -> T:
    """The result of `work`, which carries the statement out, with a span of its own and its duration counted."""
    known = _by_text.get(statement) or _noted(statement)
    began = time.perf_counter()
    try:
        with tracing.span(known.summary, known.attributes, Kind.CLIENT):
            return await work
    finally:
        known.duration.observe(time.perf_counter() - began)


def _noted(statement: str) -> _Observed:
    """What is noted of a statement that was not seen before, or is one of too many."""
    name = summary(statement)
    if name not in _by_summary:
        name = name if len(_by_summary) < _MOST_SUMMARIES else _OTHER
        if name not in _by_summary:
            _by_summary[name] = _Observed.of(name)
    known = _by_summary[name]
    if len(_by_text) < _MOST_TEXTS:
        _by_text[statement] = known
    return known
