"""Traces that are kept, as OpenTelemetry's: which those are, and where they go.

Sampling is by the trace's id, so that all who begin none agree, and parent-based: who called has decided. Beyond that,
a part of a trace in which something failed or that took long is kept, some of these each second: in an outage all are.
"""

# ruff: noqa: PLC0415  # Each exporter brings what the others do not need, and one of them may not be installed.

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from opentelemetry import trace as api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from common import logs, tracing
from common.config import ServiceSettings
from common.lifecycle import StartError
from common.tracing import Kind, Span, Trace
from common.window import SlidingCount

_log = logs.get_logger("tracing")

# Parts of traces that were not sampled, and are kept each second for what became of them.
_MOST_KEPT_PER_S = 20
_FLUSH_TIMEOUT_S = 2.0

# The part of an id that decides: OpenTelemetry's TraceIdRatioBased takes the same.
_LOW_BITS = 2**64

_KINDS = {Kind.INTERNAL: SpanKind.INTERNAL, Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT}


class _GivenIds(IdGenerator):
    """The ids that spans have already."""

    trace_id = 0
    span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class Export:
    """Keeps traces, by giving them to an exporter of OpenTelemetry's in batches, from a thread."""

    def __init__(self, service: str, exporter: SpanExporter, *, sample_ratio: float, slow_s: float) -> None:
        self._bound = round(sample_ratio * _LOW_BITS)
        self._slow_ns = slow_s * 1e9
        self._kept = SlidingCount(1.0, 1, time.monotonic)
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": f"memshard-{service}", "service.version": version("memshard")}),
            id_generator=self._ids,
            span_limits=SpanLimits(max_events=128, max_span_attributes=64),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("memshard", version("memshard"))

    def samples(self, trace_id: int) -> bool:
        return trace_id % _LOW_BITS < self._bound

    def keep(self, trace: Trace) -> bool:
        if not trace.sampled and not self._is_telling(trace):
            return False
        for span in trace.spans:
            self._give(trace, span)
        return True

    async def close(self) -> None:
        """Gives what is left to the exporter, which has two seconds for it."""
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            _log.warning("the last traces are lost: the exporter takes too long")

    def _is_telling(self, trace: Trace) -> bool:
        """Whether it is worth keeping, though it was not sampled."""
        root = trace.spans[0]
        if root.ended_ns - root.started_ns < self._slow_ns and not trace.failed:
            return False
        if self._kept.total() >= _MOST_KEPT_PER_S:
            return False
        self._kept.add()
        return True

    def _give(self, trace: Trace, span: Span) -> None:
        self._ids.trace_id, self._ids.span_id = trace.id, span.span_id
        given = self._tracer.start_span(
            span.name,
            context=_around(trace, span),
            kind=_KINDS[span.kind],
            attributes=span.attributes,
            start_time=span.started_ns,
        )
        for name, at_ns, attributes in span.events:
            given.add_event(name, attributes, at_ns)
        if span.failed:
            given.set_status(Status(StatusCode.ERROR, str(span.attributes.get("error.type", ""))))
        given.end(span.ended_ns)


def _around(trace: Trace, span: Span) -> Any:
    """What the span is in: its parent, in this process or the one that called."""
    if not span.parent_id:
        return api.set_span_in_context(api.INVALID_SPAN)
    parent = SpanContext(
        trace.id,
        span.parent_id,
        is_remote=span is trace.spans[0],
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([trace.state]) if trace.state else TraceState(),
    )
    return api.set_span_in_context(NonRecordingSpan(parent))


@asynccontextmanager
async def exporting(service: str, settings: ServiceSettings) -> AsyncIterator[None]:
    """Records traces as the settings say, until the end. Raises StartError."""
    exporter = _exporter(settings)
    if exporter is None:
        yield
        return
    export = Export(service, exporter, sample_ratio=settings.traces_sample_ratio, slow_s=settings.traces_slow_s)
    tracing.record(export)
    _log.info("traces", exporter=settings.traces_exporter, sample_ratio=settings.traces_sample_ratio)
    try:
        yield
    finally:
        tracing.record(None)
        await export.close()


def _exporter(settings: ServiceSettings) -> SpanExporter | None:
    match settings.traces_exporter:
        case "none":
            return None
        case "console":
            # A line each, as the log's.
            return ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")
        case "otlp":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter()
        case "jaeger":
            try:
                from opentelemetry.exporter.jaeger.thrift import JaegerExporter
            except ImportError as error:
                raise StartError(
                    "the exporter jaeger is not installed: pip install 'memshard-server[jaeger]'. Jaeger 1.35 and "
                    "later take OTLP, which needs nothing more: use otlp"
                ) from error
            exporter: SpanExporter = JaegerExporter()
            return exporter
