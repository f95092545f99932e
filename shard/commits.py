"""Writes that outlive their callers: a deadline or a cancelled call never cancels a commit.

Cancelling a statement that is committing can leave it visible and losable at once; so the caller may stop waiting, but
the write runs on, and the same request again finds out how it ended.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from common import logs
from common.errors import MemshardError

_log = logs.get_logger("commits")

T = TypeVar("T")


class Commits:
    """The writes under way. Wait for `settled` before closing what they use."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, write: Coroutine[Any, Any, T]) -> T:
        """The result of `write`; when the caller is cancelled, `write` goes on without it."""
        task = asyncio.create_task(write)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Nobody is left to hear how it ended.
            task.add_done_callback(_report)
            raise

    @property
    def count(self) -> int:
        """How many are under way."""
        return len(self._running)

    async def settled(self, timeout_s: float) -> None:
        """Waits until every write has ended, in whichever way; what has not after `timeout_s` stays in doubt."""
        if self._running:
            _, pending = await asyncio.wait(self._running, timeout=timeout_s)
            if pending:
                _log.warning("writes left in doubt", count=len(pending))


def _report(task: asyncio.Task[Any]) -> None:
    """Logs a bug in a write whose caller has gone. Domain errors are answers, and the same request will hear them."""
    if not task.cancelled() and (error := task.exception()) and not isinstance(error, MemshardError | TimeoutError):
        _log.error("a write failed by a bug after its caller had gone", **logs.describe_bug(error))
