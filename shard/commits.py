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
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def settled(self, timeout_s: float) -> None:
        """Waits until every write has ended, in whichever way; what has not after `timeout_s` stays in doubt."""
        if self._running:
            _, pending = await asyncio.wait(self._running, timeout=timeout_s)
            if pending:
                _log.warning("writes left in doubt", count=len(pending))

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Retrieving the exception keeps asyncio from complaining that nobody did, when the caller had gone. One that
        # stayed gets it too, and its handler logs it; domain errors are answers, not events.
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, MemshardError):
            _log.debug("a write failed", error=type(error).__name__)
