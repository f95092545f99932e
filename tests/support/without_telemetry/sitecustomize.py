"""A Python that starts with this directory on its path counts and traces nothing (tests/cluster/overhead.py).

There is no such setting: what it costs is what this directory is there to find out.
"""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from common import tracing


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In place of what would count."""


def _no_span(*_args: Any, **_kwargs: Any) -> tracing.Span:
    return tracing.NO_SPAN


for kind, methods in {Counter: ("inc",), Gauge: ("inc", "dec", "set"), Histogram: ("observe",)}.items():
    for method in methods:
        setattr(kind, method, _nothing)
tracing.received = _no_span
tracing.span = _no_span
