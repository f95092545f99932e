"""Requests of one kind that share their work while there is much of it: natural batching. Pure of what the work is.

Whoever comes while little is under way is served at once and alone. Whoever comes later waits until something under way
has ended, and is then served together with all others who wait: the more there is to do, the more is done at once, and
there is no timer to wait for on a quiet day. What is under way may itself be held up, by a slot that is being handed
over; so nobody waits for longer than a few milliseconds before something more is begun.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from common import tracing
from common.deadline import Deadline
from common.errors import Unavailable
from common.tracing import Span

Q = TypeVar("Q")
R = TypeVar("R")

# Most requests that are served together: their rows are some hundred kilobytes, and the first of them waits for the
# last.
_MOST = 50
# Under way before others wait. Two, so that one is being prepared while the other is in the database.
_AT_ONCE = 2
# Longest wait in seconds before something more is begun, and how much may be under way then.
_PATIENCE_S = 0.003
_MOST_AT_ONCE = 8

# The request of one, or the slot that it is about, and not what all of them need.
_OF_ONE = "SLOT_BUSY"


@dataclass(slots=True)
class _Waiting(Generic[Q, R]):
    request: Q
    deadline: Deadline
    answer: "asyncio.Future[R | None]"
    """None: it is to be served alone."""
    span: Span
    context: contextvars.Context
    """That of its call, within the span."""


class Gathering(Generic[Q, R]):
    """Serves requests alone, or several together.

    `together` gives the answer of each, in order, or None for one that it cannot answer without the others paying for
    it: that is served alone. What it raises none of them has had an effect by, unless it says that it is in doubt.

    In a trace, whoever waits has a span with this `name`. What is done together is in the trace of one of them, and the
    others' spans have a link to it.
    """

    def __init__(
        self,
        name: str,
        alone: Callable[[Q, Deadline], Awaitable[R]],
        together: Callable[[Sequence[Q], Deadline], Awaitable[Sequence[R | None]]],
    ) -> None:
        self._name = name
        self._alone = alone
        self._together = together
        self._under_way = 0
        self._waiting: deque[_Waiting[Q, R]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._patience: asyncio.TimerHandle | None = None

    async def serve(self, request: Q, deadline: Deadline) -> R:
        """The answer to one request. Raises what serving it raises.

        A caller who leaves while it waits leaves nothing behind; later, what was begun goes on.
        """
        if self._under_way < _AT_ONCE and not self._waiting:
            self._under_way += 1
            try:
                return await self._alone(request, deadline)
            finally:
                self._ended()
        answered: asyncio.Future[R | None] = asyncio.get_running_loop().create_future()
        with tracing.span(self._name) as span:
            self._waiting.append(_Waiting(request, deadline, answered, span, contextvars.copy_context()))
            self._be_patient()
            answer = await answered
        return await self._alone(request, deadline) if answer is None else answer

    def _ended(self) -> None:
        self._under_way -= 1
        while self._waiting and self._under_way < _AT_ONCE:
            self._begin()

    def _begin(self) -> None:
        """Takes up those who wait."""
        taken: list[_Waiting[Q, R]] = []
        while self._waiting and len(taken) < _MOST:
            waiting = self._waiting.popleft()
            # Whoever has left is not served.
            if not waiting.answer.done():
                taken.append(waiting)
        if taken:
            self._under_way += 1
            task = asyncio.create_task(self._serve(taken), context=_noted(taken))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, taken: Sequence[_Waiting[Q, R]]) -> None:
        try:
            if len(taken) == 1:
                # Which is cheaper, and the same.
                answers: Sequence[R | None] = [await self._alone(taken[0].request, taken[0].deadline)]
            else:
                longest = max((waiting.deadline for waiting in taken), key=lambda deadline: deadline.at)
                answers = await self._together([waiting.request for waiting in taken], longest)
        except Exception as error:  # Whatever it is, each of those who wait has to hear it, or is served alone.
            _fail(taken, error)
        else:
            for waiting, answer in zip(taken, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)
        finally:
            for waiting in taken:
                # Nobody is left without an answer, not even when this is cancelled.
                waiting.answer.cancel()
            self._ended()

    def _be_patient(self) -> None:
        if self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(_PATIENCE_S, self._lose_patience)

    def _lose_patience(self) -> None:
        self._patience = None
        if self._waiting and self._under_way < _MOST_AT_ONCE:
            self._begin()
        if self._waiting:
            self._be_patient()


def _noted(taken: "Sequence[_Waiting[Q, R]]") -> contextvars.Context:
    """Where what is done for all of them is done: in the trace of one that is kept in any case, if there is one."""
    first = max(taken, key=lambda waiting: (waiting.span.is_recorded, waiting.span.is_sampled))
    for waiting in taken:
        waiting.span.event("begun", {"memshard.gathered": len(taken)})
        if waiting is not first:
            waiting.span.link(first.span)
    return first.context


def _fail(taken: Sequence[_Waiting[Q, R]], error: Exception) -> None:
    for waiting in taken:
        if waiting.answer.done():
            continue
        if len(taken) == 1 or not _is_of_one(error):
            waiting.answer.set_exception(error)
        else:
            waiting.answer.set_result(None)


def _is_of_one(error: Exception) -> bool:
    """Whether one of several may be the cause, and the others would succeed without it."""
    if isinstance(error, Unavailable):
        # OutcomeUnknown is one: alone, each would hear that it is there, by a commit that may yet be lost.
        return error.reason == _OF_ONE
    # Else it is a value that the database does not take, or a bug that one request sets off.
    return not isinstance(error, TimeoutError)
