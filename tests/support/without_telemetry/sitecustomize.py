"""A Python that starts with this directory on its path counts, serves and traces nothing (tests/cluster/overhead.py).

There is no such setting: what it costs is what this directory is there to find out. What is replaced here is replaced
before any module of the project asks for it. docs/observability.md says what is off then, and what is not.
"""

from collections.abc import Awaitable
from typing import Any, Self, TypeVar

import prometheus_client

from common.telemetry import instruments

T = TypeVar("T")


class _Instrument:
    """In place of a counter, a gauge, a histogram or a collector: keeps nothing, whatever its labels."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def labels(self, *_args: Any, **_kwargs: Any) -> Self:
        return self

    def inc(self, *_args: Any, **_kwargs: Any) -> None: ...

    dec = set = observe = remove = inc


for _name in ("ProcessCollector", "PlatformCollector"):
    setattr(prometheus_client, _name, _Instrument)
for _name in ("Counter", "Gauge", "Histogram"):
    setattr(instruments, _name, _Instrument)

# From here on, since these import the above.
from common import tracing  # noqa: E402
from common.telemetry import calls, exposition  # noqa: E402


class _Operation:
    """In place of what is counted of an rpc."""

    def __init__(self, *_args: Any) -> None: ...


class _Call:
    """In place of what counts one call, within its span."""

    __slots__ = ("answered", "error")

    def __init__(self, *_args: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Exposition:
    """In place of the page: no port, no thread."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


def _no_span(*_args: Any, **_kwargs: Any) -> tracing.Span:
    return tracing.NO_SPAN


tracing.received = _no_span
tracing.span = _no_span
calls.Operation = _Operation  # type: ignore[assignment,misc]
calls.Call = _Call  # type: ignore[assignment,misc]
exposition.Exposition = _Exposition  # type: ignore[assignment,misc]

from common import rpc  # noqa: E402
from shard import statements  # noqa: E402

_methods_of = rpc.methods_of


def _unwatched(*args: Any, **kwargs: Any) -> Any:
    """A router's methods without what notes who asks for how much."""
    return _methods_of(*args, **{**kwargs, "watch": None, "begins_traces": False})


async def _unobserved(statement: str, work: Awaitable[T]) -> T:
    return await work


rpc.methods_of = _unwatched
statements.observed = _unobserved
