"""Cancellations that somebody on the way has swallowed.

`asyncio.wait_for` up to Python 3.11, through which redis-py writes, takes a cancellation that comes together with a
result for none at all. Whoever loops around such calls would never end.
"""

import asyncio


def requested() -> int:
    """How often the current task was asked to end, and has not yet been told to go on."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def raise_if_cancelled(since: int = 0) -> None:
    """Raises CancelledError when the current task was asked to end more often than `since`, which `requested` gave."""
    if requested() > since:
        raise asyncio.CancelledError
