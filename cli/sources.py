"""Which format a stream is in, by its content, and the records in it."""

import io
import json
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO, Final, cast

from cli.locomo import count_turns, from_conversations
from cli.records import BadRecord, Parsed, from_json_lines

_BLANK: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"


def read_records(stream: BinaryIO, default_user: str | None = None) -> Iterator[Parsed]:
    """The records in LoCoMo's JSON (an array, read whole) or in JSON Lines (read line by line)."""
    head, is_array = _begin(stream)
    if not is_array:
        yield from from_json_lines(cast(BinaryIO, _Resumed(head, stream)), default_user)
        return
    conversations = _array(head + stream.read())
    if isinstance(conversations, BadRecord):
        yield conversations
    else:
        yield from from_conversations(conversations)


def count_records(stream: BinaryIO) -> int:
    """About how many records a file holds, for a progress bar: turns, or lines."""
    head, is_array = _begin(stream)
    if is_array:
        conversations = _array(head + stream.read())
        return 0 if isinstance(conversations, BadRecord) else count_turns(conversations)
    blocks = chain([head], iter(lambda: stream.read(1024 * 1024), b""))
    lines, last = 0, b"\n"
    for block in blocks:
        lines += block.count(b"\n")
        last = block[-1:] or last
    return lines + (last != b"\n")


class _Resumed:
    """A stream whose beginning was read already."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = io.BytesIO(head)
        self._rest = rest

    def readline(self, limit: int) -> bytes:
        line = self._head.readline(limit)
        if line.endswith(b"\n") or len(line) == limit:
            return line
        return line + self._rest.readline(limit - len(line))


def _begin(stream: BinaryIO) -> tuple[bytes, bool]:
    """What had to be read to see whether the stream is an array, and whether it is.

    That is one line of a pipe at most, so that a slow one is not waited for longer than its first record takes.
    """
    head = b""
    while block := stream.readline(4096):
        head += block
        if text := head.removeprefix(_BOM).lstrip(_BLANK):
            return head, text.startswith(b"[")
    return head, False


def _array(data: bytes) -> list[object] | BadRecord:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRecord("the file", "", f"begins as a JSON array, but is not JSON: {error}")
    return cast(list[object], value)
