"""A receiver of traces, as Jaeger or a collector is one: real gRPC, OTLP, on a free port."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

_SERVICE = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"].full_name


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
    """`async with` it: collects all spans that are sent to `endpoint`. They are looked into when somebody asks."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.endpoint = ""
        self._received: list[Received] = []
        self._read = 0
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        export: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Export": export}),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        await self._server.stop(None)

    async def _export(self, request: bytes, _: object) -> bytes:
        self.raw.append(request)
        return trace_service_pb2.ExportTraceServiceResponse().SerializeToString()

    @property
    def received(self) -> list[Received]:
        """All spans, as far as they have come."""
        for raw in self.raw[self._read :]:
            self._read += 1
            for resource_spans in trace_service_pb2.ExportTraceServiceRequest.FromString(raw).resource_spans:
                named = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
                for scope_spans in resource_spans.scope_spans:
                    self._received += [Received(named["service.name"], span) for span in scope_spans.spans]
        return self._received

    @contextmanager
    def environment(self, *, soon: bool = True) -> Iterator[None]:
        """What is started meanwhile sends its traces here: soon, or as rarely as OpenTelemetry's SDK does by itself."""
        wanted = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint}
        if soon:
            wanted["OTEL_BSP_SCHEDULE_DELAY"] = "100"
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
