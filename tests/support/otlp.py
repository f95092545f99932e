"""A receiver of traces, as Jaeger or a collector is one: real gRPC, OTLP, on a free port."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Node:
    """A span with its children, in the order of their names."""

    service: str
    name: str
    children: tuple["Node", ...] = ()

    @property
    def size(self) -> int:
        """How many spans it is, with those below."""
        return 1 + sum(child.size for child in self.children)


def values_of(attributes: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    """Attributes, of a span or an event, by name."""
    values = {item.key: item.value for item in attributes}
    return {key: getattr(value, value.WhichOneof("value") or "string_value") for key, value in values.items()}


@dataclass(frozen=True)
class Received:
    """One span, and the service that it came from."""

    service: str
    span: trace_pb2.Span

    @property
    def attributes(self) -> dict[str, Any]:
        return values_of(self.span.attributes)


class OtlpReceiver:
    """`async with` it: collects all spans that are sent to `endpoint`."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.raw: list[bytes] = []
        self.endpoint = ""
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        await self._server.stop(None)

    async def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, _: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.raw.append(request.SerializeToString())
        for resource_spans in request.resource_spans:
            named = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
            for scope_spans in resource_spans.scope_spans:
                self.received += [Received(named["service.name"], span) for span in scope_spans.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    @contextmanager
    def environment(self) -> Iterator[None]:
        """What is started meanwhile sends its traces here, soon."""
        wanted = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def of_trace(self, trace_id: str) -> list[Received]:
        """All spans of a trace, as far as they have come."""
        return [found for found in self.received if found.span.trace_id.hex() == trace_id]

    def tree(self, trace_id: str, below: str) -> tuple[Node, ...]:
        """The spans of a trace whose parent is `below` (hexadecimal), with theirs."""
        spans = self.of_trace(trace_id)

        def children(parent: bytes) -> tuple[Node, ...]:
            found = [item for item in spans if item.span.parent_span_id == parent]
            nodes = [Node(item.service, item.span.name, children(item.span.span_id)) for item in found]
            return tuple(sorted(nodes, key=lambda node: node.name))

        return children(bytes.fromhex(below))
