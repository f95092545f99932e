"""The trace that the caller is in, if it uses OpenTelemetry, as what a call carries (W3C Trace Context)."""

from __future__ import annotations

import sys
from typing import Final

Carried = tuple[tuple[str, str], ...]

_API: Final = "opentelemetry.trace"


def carried() -> Carried | None:
    """`traceparent` and `tracestate` of the current span; None when there is none.

    Whoever is in a span has imported OpenTelemetry; who has not need not have it.
    """
    api = sys.modules.get(_API)
    if api is None:
        return None
    here = api.get_current_span().get_span_context()
    if not here.is_valid:
        return None
    parent = ("traceparent", f"00-{here.trace_id:032x}-{here.span_id:016x}-{int(here.trace_flags) & 0xFF:02x}")
    state: str = here.trace_state.to_header() if here.trace_state else ""
    return (parent, ("tracestate", state)) if state else (parent,)
