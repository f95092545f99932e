"""What a statement does, in the few words that a metric or a span may have: never its text or its parameters."""

import re
import time
from collections.abc import Awaitable
from typing import TypeVar

from common import tracing
from common.telemetry.instruments import Histogram
from common.telemetry.registry import STATEMENTS
from common.tracing import Kind

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

_summaries: dict[str, str] = {}
_durations: dict[str, Histogram] = {}


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
    name = _summary(statement)
    operation, _, table = name.partition(" ")
    began = time.perf_counter()
    try:
        with tracing.span(
            name,
            {
                "db.system.name": "postgresql",
                "db.operation.name": operation,
                "db.collection.name": table,
                "db.query.summary": name,
            },
            Kind.CLIENT,
        ):
            return await work
    finally:
        _durations[name].observe(time.perf_counter() - began)


def _summary(statement: str) -> str:
    known = _summaries.get(statement)
    if known is None:
        known = summary(statement)
        if known not in _durations:
            known = known if len(_durations) < _MOST_SUMMARIES else _OTHER
            _durations.setdefault(known, STATEMENTS.labels(known))
        if len(_summaries) < _MOST_TEXTS:
            _summaries[statement] = known
    return known
