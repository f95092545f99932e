"""Traces that are kept, as OpenTelemetry's: which those are, and where they go.

Sampling is by the trace's id, so that all who begin none agree, and parent-based: who called has decided. Beyond that,
a part of a trace in which something failed or that took long is kept, some of these each second: in an outage all are.
Each cause has a number of its own, so that a flood of refusals leaves room for what failed in another way meanwhile.
"""

# ruff: noqa: PLC0415  # Each exporter brings what the others do not need, and one of them may not be installed.

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Literal

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from common import logs, tracing
from common.config import ReplicaSettings, ServiceSettings, ShardSettings
from common.lifecycle import StartError
from common.telemetry.registry import TRACES_DROPPED
from common.tracing import Kind, Span, Trace
from common.window import SlidingCount

Cause = Literal["failed", "slow", "shed"]

_log = logs.get_logger("tracing")

# Parts of traces that were not sampled, and are kept each second for what became of them: something in it failed, it
# took long, or something was refused for being too much, if only at the first attempt. One refusal is like the other.
_MOST_KEPT_PER_S: dict[Cause, int] = {"failed": 20, "slow": 10, "shed": 1}
_FLUSH_TIMEOUT_S = 2.0

# The part of an id that decides: OpenTelemetry's TraceIdRatioBased takes the same.
_LOW_BITS = 2**64

_VERSION = version("memshard")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status()
_KINDS = {Kind.INTERNAL: SpanKind.INTERNAL, Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT}


class _Resource(Resource):
    """The SDK groups spans by their resource, and writes all of it as JSON to have the hash of each one's."""

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash


class Export:
    """Keeps traces, by giving them to an exporter of OpenTelemetry's in batches, from a thread."""

    def __init__(
        self,
        service: str,
        exporter: SpanExporter,
        *,
        sample_ratio: float,
        slow_s: float,
        clock: Callable[[], float] = time.monotonic,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        """`attributes` say which one of the service this is, where OTEL_RESOURCE_ATTRIBUTES do not."""
        self._bound = round(sample_ratio * _LOW_BITS)
        self._slow_ns = slow_s * 1e9
        self._kept = {cause: SlidingCount(1.0, 1, clock) for cause in _MOST_KEPT_PER_S}
        self._dropped = {cause: TRACES_DROPPED.labels(cause) for cause in _MOST_KEPT_PER_S}
        said = OTELResourceDetector().detect().attributes
        named = {"service.name": f"memshard-{service}", "service.version": _VERSION}
        self._resource = _Resource(Resource.create({**(attributes or {}), **said, **named}).attributes)
        self._scope = InstrumentationScope("memshard", _VERSION)
        self._processor = BatchSpanProcessor(exporter)

    def samples(self, trace_id: int) -> bool:
        return trace_id % _LOW_BITS < self._bound

    def keep(self, trace: Trace) -> bool:
        if not trace.sampled and not trace.wanted and not self._is_telling(trace):
            return False
        for span in trace.spans:
            self._processor.on_end(self._made(trace, span))
        return True

    async def close(self) -> None:
        """Gives what is left to the exporter, which has two seconds for it."""
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await asyncio.to_thread(self._processor.shutdown)
        except TimeoutError:
            _log.warning("the last traces are lost: the exporter takes too long")

    def _is_telling(self, trace: Trace) -> bool:
        """Whether it is worth keeping, though it was not sampled."""
        cause = self._cause(trace)
        if cause is None:
            return False
        if self._kept[cause].total() >= _MOST_KEPT_PER_S[cause]:
            self._dropped[cause].inc()
            return False
        self._kept[cause].add()
        return True

    def _cause(self, trace: Trace) -> Cause | None:
        """What makes it worth keeping; of several causes, the one of which there are fewest in a flood."""
        if trace.failed:
            return "failed"
        root = trace.spans[0]
        # Who was refused in the end has waited as long as he was allowed to.
        if root.ended_ns - root.started_ns >= self._slow_ns and not root.shed:
            return "slow"
        return "shed" if trace.shed else None

    def _made(self, trace: Trace, span: Span) -> ReadableSpan:
        """A span as OpenTelemetry has it when it has ended. By way of its tracer this would take five times as long.

        It lacks the tracestate, which travels and is nothing of ours: a caller may have written anything in it.
        """
        attributes = span.attributes
        parent = None
        if span.parent_id:
            remote = span is trace.spans[0]
            parent = SpanContext(trace.id, span.parent_id, is_remote=remote, trace_flags=_SAMPLED)
        return ReadableSpan(
            span.name,
            context=SpanContext(trace.id, span.span_id, is_remote=False, trace_flags=_SAMPLED),
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            # Jaeger's exporter asks these how many were dropped.
            events=[Event(name, BoundedAttributes(attributes=values), at_ns) for name, at_ns, values in span.events],
            links=[Link(SpanContext(*ids, is_remote=False, trace_flags=_SAMPLED)) for ids in span.links],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, str(attributes.get("error.type", ""))) if span.failed else _UNSET,
            start_time=span.started_ns,
            end_time=span.ended_ns,
            instrumentation_scope=self._scope,
        )


@asynccontextmanager
async def exporting(service: str, settings: ServiceSettings) -> AsyncIterator[None]:
    """Records traces as the settings say, until the end. Raises StartError."""
    exporter = _exporter(settings)
    if exporter is None:
        yield
        return
    export = Export(
        service,
        exporter,
        sample_ratio=settings.traces_sample_ratio,
        slow_s=settings.traces_slow_s,
        attributes=_which(settings),
    )
    tracing.record(export)
    _log.info("traces", exporter=settings.traces_exporter, sample_ratio=settings.traces_sample_ratio)
    try:
        yield
    finally:
        tracing.record(None)
        await export.close()


def _which(settings: ServiceSettings) -> dict[str, str]:
    """One of several that do the same. In a container the host's name is its own."""
    instance = {"service.instance.id": f"{socket.gethostname()}:{settings.port}"}
    if isinstance(settings, ShardSettings | ReplicaSettings):
        instance["memshard.shard"] = settings.shard_id
    return instance


def _exporter(settings: ServiceSettings) -> SpanExporter | None:
    match settings.traces_exporter:
        case "none":
            return None
        case "console":
            # A line each, as the log's.
            return ConsoleSpanExporter(formatter=lambda span: span.to_json(indent=None) + "\n")
        case "otlp":
            try:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            except ImportError as error:
                raise StartError("the exporter otlp is not installed: pip install 'memshard-server[otlp]'") from error
            return OTLPSpanExporter()
        case "jaeger":
            try:
                from opentelemetry.exporter.jaeger.thrift import JaegerExporter
            except ImportError as error:
                raise StartError(
                    "the exporter jaeger is not installed: pip install 'memshard-server[jaeger]'. Jaeger 1.35 and "
                    "later take OTLP: use otlp"
                ) from error
            exporter: SpanExporter = JaegerExporter()
            return exporter
