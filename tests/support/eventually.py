"""Waiting for something to become true, with a deadline instead of a sleep."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

T = TypeVar("T")

_INTERVAL_S = 0.05


@overload
async def eventually(condition: Callable[[], Coroutine[Any, Any, T]], *, within_s: float = 10.0) -> T: ...
@overload
async def eventually(condition: Callable[[], T], *, within_s: float = 10.0) -> T: ...
async def eventually(condition: Callable[[], Any], *, within_s: float = 10.0) -> Any:
    """Asks until the condition, a function or a coroutine function, gives something true, and returns that.

    An exception counts as "not yet". Raises AssertionError with the last failure when the time is up.
    """
    deadline = time.monotonic() + within_s
    while True:
        failure: Exception | None = None
        result: Any = None
        try:
            answer = condition()
            result = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            failure = error
        if failure is None and result:
            return result
        if time.monotonic() >= deadline:
            last = f"{type(failure).__name__}: {failure}" if failure else f"it was {result!r}"
            raise AssertionError(f"not true within {within_s:g} s; {last}") from failure
        await asyncio.sleep(_INTERVAL_S)
