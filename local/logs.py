"""The processes' logs: bounded, private, and the supervisor's own."""

import json
import logging
import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from common.logs import describe_bug

# Two files of this size per process, the current one and the one before.
MAX_BYTES = 32 * 1024 * 1024

_TAIL_BYTES = 64 * 1024


def open_for(path: Path) -> int:
    """A descriptor that a process's output is appended to."""
    bound(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def bound(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Moves the log's text aside when it has grown over `max_bytes`.

    Copied and cut off, since the process goes on writing to the same file; what it writes in between is lost.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return
    except FileNotFoundError:
        return
    with suppress(OSError):  # On a full disk the room is worth more than the copy.
        shutil.copy2(path, path.with_name(path.name + ".1"))
    os.truncate(path, 0)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def supervisor_logger(path: Path) -> tuple[logging.Logger, logging.Handler]:
    """The supervisor's logger, and its handler, which the caller closes."""
    bound(path)
    logger = logging.getLogger("memshard.supervisor")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.FileHandler(path, encoding="utf-8")
    path.chmod(0o600)
    handler.setFormatter(_JsonLines())
    logger.addHandler(handler)
    return logger, handler


class _JsonLines(logging.Formatter):
    """One object a line, with the names that the services' logs use; an exception by its type and place, as there."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= describe_bug(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)
