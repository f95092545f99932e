"""What an import stores: checked records, from JSON Lines. Pure, and streaming: one line is held at a time."""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final, TypeAlias

from memshard import MemoryType

MAX_LINE_BYTES: Final = 8 * 1024 * 1024
"""Above the longest line that can be a memory: 64 KiB of content and 32 KiB of metadata, escaped, and a vector."""

_NAMESPACE: Final = uuid.UUID("6f1d3c0e-53a8-4a4e-9d0c-2f1f6a2f7c55")
"""Of the ids that are derived from where a memory comes from. Another one would make every import store twice."""


@dataclass(frozen=True, slots=True)
class Record:
    """A memory to store. `source` says where it comes from, for people: "line 3"."""

    source: str
    id: str
    user_id: str
    content: str
    agent_id: str = ""
    session_id: str = ""
    type: MemoryType = MemoryType.EPISODIC
    metadata: dict[str, Any] | None = None
    importance: float | None = None
    embedding: list[float] | None = None
    embedding_model: str = ""
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class BadRecord:
    """Something that is no memory: where it is, which field is wrong ("" for all of it), and why."""

    source: str
    field: str
    message: str


Parsed: TypeAlias = Record | BadRecord


def derived_id(user_id: str, *identity: str) -> str:
    """The id of a memory by its origin: the same each time, so that an import that is repeated stores nothing twice."""
    return str(uuid.uuid5(_NAMESPACE, json.dumps([user_id, *identity])))


def from_json_lines(stream: BinaryIO, default_user: str | None = None) -> Iterator[Parsed]:
    """The records in a stream of JSON Lines, with a BadRecord for each line that is none. Empty lines do not count.

    A line without an id gets one derived from its content, and from how many equal lines came before it: a file may
    hold a memory twice on purpose. That takes some hundred bytes for each such line; ids in the file take none.
    """
    seen: dict[int, int] = {}
    for number, line in _lines(stream):
        source = f"line {number}"
        if line is None:
            yield BadRecord(source, "", f"is longer than {MAX_LINE_BYTES // 1024**2} MiB")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield _record(source, _parse(text), default_user, seen)
        except _WrongField as wrong:
            yield BadRecord(source, wrong.field, wrong.message)
        except RecursionError:
            yield BadRecord(source, "", "is nested too deep")
        except UnicodeDecodeError as error:
            yield BadRecord(source, "", f"is not UTF-8: {error.reason} at byte {error.start}")


class _WrongField(Exception):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines, with None for one that is too long."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        too_long = False
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            too_long = True
            line = stream.readline(MAX_LINE_BYTES)
        yield number, None if too_long else line


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise _WrongField("", f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _WrongField("", "is not a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _record(source: str, document: dict[str, Any], default_user: str | None, seen: dict[int, int]) -> Record:
    fields = _fields(document)
    content = fields.pop("content", None)
    if not content:
        raise _WrongField("content", "is missing")
    user_id = fields.pop("user_id", None) or default_user
    if not user_id:
        raise _WrongField("user_id", "is missing, and --user gives no default")
    memory_id = fields.pop("id", None) or _content_id(user_id, content, fields, seen)
    return Record(source=source, id=memory_id, user_id=user_id, content=content, **fields)


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    """The checked values of the keys that are given, by field name; null is the same as absent."""
    fields: dict[str, Any] = {}
    for key, value in document.items():
        name = _NAMES.get(key)
        if name is None:
            raise _WrongField(key, "is not a field of a memory")
        if name in fields:
            raise _WrongField(key, "is given twice")
        reader = _READERS[name]
        if reader is not None and value is not None:
            try:
                fields[name] = reader(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise _WrongField(name, str(error)) from None
    return fields


def _content_id(user_id: str, content: str, fields: dict[str, Any], seen: dict[int, int]) -> str:
    # Only what is given counts, so that a field added to the format later leaves the ids of older files alone.
    given = {name: value for name, value in fields.items() if value not in ("", None, MemoryType.EPISODIC)}
    canonical = json.dumps([user_id, content, given], sort_keys=True, default=str)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    # 64 bits tell the lines of one file apart; a collision would only begin a count at 1 in place of 0, each time.
    key = int(digest[:16], 16)
    occurrence = seen.get(key, 0)
    seen[key] = occurrence + 1
    return derived_id(user_id, "line", digest, str(occurrence))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode: it holds a lone surrogate") from None
    return value


def _type(value: Any) -> MemoryType:
    name = str(value).upper().removeprefix("MEMORY_TYPE_")
    known = MemoryType.__members__.get(name)
    if known is None and not isinstance(value, bool) and isinstance(value, int) and value in list(MemoryType):
        known = MemoryType(value)
    if known is None:
        raise ValueError(f"must be one of {', '.join(one.name for one in MemoryType if one)}, not {value!r}")
    return known or MemoryType.EPISODIC  # Unspecified is stored as episodic.


def _object(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise TypeError("must be an object")
    return value or None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("must be a number")
    return float(value)


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list) or any(isinstance(n, bool) or not isinstance(n, int | float) for n in value):
        raise TypeError("must be a list of numbers")
    return [float(number) for number in value] or None


def _time(value: Any) -> datetime:
    try:
        moment = datetime.fromisoformat(_text(value))
    except ValueError:
        raise ValueError("must be a time such as 2030-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("must name its time zone, as 2030-01-31T12:00:00Z does")
    return moment.astimezone(UTC)


# None reads nothing: what the service alone sets is in the output of `memshard get --json`, which can be imported.
_READERS: Final[dict[str, Callable[[Any], Any] | None]] = {
    "id": _text,
    "user_id": _text,
    "content": _text,
    "agent_id": _text,
    "session_id": _text,
    "type": _type,
    "metadata": _object,
    "importance": _number,
    "embedding": _numbers,
    "embedding_model": _text,
    "expire_time": _time,
    "embedding_state": None,
    "create_time": None,
    "update_time": None,
    "version": None,
}


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


_NAMES: Final = {name: name for name in _READERS} | {_camel(name): name for name in _READERS}
