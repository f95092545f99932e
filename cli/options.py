"""The options that commands share, and the words of their values."""

import json
import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import typer

from memshard import MemoryType, ReadLevel, SearchMode

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_S = 10.0


class TypeName(StrEnum):
    """The memory types, as people write them."""

    EPISODIC = "episodic"
    SEMANTIC = "semantic"
    PROCEDURAL = "procedural"
    WORKING = "working"

    @property
    def memory_type(self) -> MemoryType:
        """The SDK's word for it."""
        return MemoryType[self.name]


class ModeName(StrEnum):
    """The search modes, as people write them."""

    SEMANTIC = "semantic"
    KEYWORD = "keyword"

    @property
    def search_mode(self) -> SearchMode:
        """The SDK's word for it."""
        return SearchMode[self.name]


class ReadName(StrEnum):
    """The read levels, as people write them."""

    STRONG = "strong"
    SESSION = "session"
    BOUNDED = "bounded"
    EVENTUAL = "eventual"

    @property
    def read_level(self) -> ReadLevel:
        """The SDK's word for it."""
        return ReadLevel.BOUNDED_STALENESS if self is ReadName.BOUNDED else ReadLevel[self.name]


def not_empty(value: str | None) -> str | None:
    """The value itself, unless it is the empty string."""
    # An empty variable in a script must not turn one user's search into everybody's.
    if value == "":
        raise typer.BadParameter("must not be empty")
    return value


Address = Annotated[
    str, typer.Option("--address", envvar="MEMSHARD_ADDRESS", metavar="HOST:PORT", help="Where the router listens.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.001, metavar="SECONDS", help="How long to wait for each answer.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Read = Annotated[
    # A command has no session of its own that went before, so that only strong shows what the one before has stored.
    ReadName,
    typer.Option("--read", case_sensitive=False, help="How fresh: from the primary, or from any server that will do."),
]
MaxStaleness = Annotated[
    float | None,
    typer.Option("--max-staleness", min=0.001, metavar="SECONDS", help="How old at most, with --read bounded."),
]
User = Annotated[str, typer.Option("--user", "-u", callback=not_empty, help="Whose memories.")]


def staleness(read: ReadName, max_staleness_s: float | None) -> float | None:
    """The bound itself, where it goes with the level. Raises typer.BadParameter."""
    if (read is ReadName.BOUNDED) != (max_staleness_s is not None):
        raise typer.BadParameter("--read bounded and --max-staleness go together")
    return max_staleness_s


def parse_metadata(text: str) -> dict[str, Any]:
    """A JSON object. Raises typer.BadParameter for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter('must be a JSON object such as {"topic": "tea"}')
    return value


def parse_expiry(text: str, now: datetime | None = None) -> datetime:
    """A time from now such as 90s, 30m, 12h, 7d or 2w, or an ISO 8601 time, in UTC where it names no zone.

    Raises typer.BadParameter for anything else.
    """
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    try:
        if match := re.fullmatch(r"(\d+)([smhdw])", text):
            return (now or datetime.now(UTC)) + timedelta(**{units[match[2]]: int(match[1])})
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter("must be a time such as 7d, 12h or 2030-01-31T12:00:00Z") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
