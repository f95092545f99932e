"""What pg_controldata tells of a server that does not run. Pure."""

import re

from local.errors import LocalClusterError

_STATE = re.compile(r"^Database cluster state: +(.+)$", re.MULTILINE)
_TIMELINE = re.compile(r"^Latest checkpoint's TimeLineID: +([0-9]+)$", re.MULTILINE)
_CHECKPOINT = re.compile(r"^Latest checkpoint location: +([0-9A-F]+)/([0-9A-F]+)$", re.MULTILINE)


def is_shut_down(text: str) -> bool:
    """Whether the server ended in order, as a primary."""
    found = _STATE.search(text)
    return found is not None and found[1].strip() == "shut down"


def timeline(text: str) -> int:
    """The timeline of its last checkpoint. Raises LocalClusterError."""
    found = _TIMELINE.search(text)
    if found is None:
        raise LocalClusterError("pg_controldata does not say which timeline the last checkpoint is on")
    return int(found[1])


def last_checkpoint(text: str) -> int:
    """Where its last checkpoint begins in the log: after an orderly end it is the last thing there.

    Raises LocalClusterError.
    """
    found = _CHECKPOINT.search(text)
    if found is None:
        raise LocalClusterError("pg_controldata does not say where the last checkpoint is")
    return (int(found[1], 16) << 32) | int(found[2], 16)
