"""A call carries the trace that its caller is in, and nothing where there is none."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

from memshard import AsyncMemoryClient, MemoryClient
from memshard._tracing import carried
from memshard.v1 import memory_pb2 as pb

TRACER = TracerProvider().get_tracer("agent")
ID = "0197f0a0-0000-7000-8000-000000000000"


async def heard(asks: Callable[[str], Awaitable[None]]) -> dict[str, str | bytes]:
    """What a call carries that `asks` makes to an address."""
    seen: list[dict[str, str | bytes]] = []

    async def delete(_: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        seen.append(dict(context.invocation_metadata() or ()))
        return pb.DeleteMemoryResponse().SerializeToString()

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "DeleteMemory": grpc.unary_unary_rpc_method_handler(delete)
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("memshard.v1.MemoryService", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        await asks(f"127.0.0.1:{port}")
    finally:
        await server.stop(None)
    (carried_by_the_call,) = seen
    return carried_by_the_call


async def ask_blocking(address: str) -> None:
    def delete() -> None:
        with MemoryClient(address) as client:
            client.delete("u", ID)

    await asyncio.to_thread(delete)


async def ask(address: str) -> None:
    async with AsyncMemoryClient(address) as client:
        await client.delete("u", ID)


@pytest.mark.parametrize("asks", [ask_blocking, ask])
async def test_both_clients_send_the_span_that_they_are_called_in(asks: Callable[[str], Awaitable[None]]) -> None:
    with TRACER.start_as_current_span("think") as span:
        carried_by_the_call = await heard(asks)
    here = span.get_span_context()
    assert (
        carried_by_the_call["traceparent"] == f"00-{here.trace_id:032x}-{here.span_id:016x}-{int(here.trace_flags):02x}"
    )


def test_the_state_of_a_trace_goes_with_it_and_outside_of_one_there_is_nothing() -> None:
    assert carried() is None
    context = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(0), trace_state=TraceState([("a", "b")]))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert carried() == (("traceparent", f"00-{1:032x}-{2:016x}-00"), ("tracestate", "a=b"))


def test_the_clients_do_not_import_opentelemetry() -> None:
    program = "import sys, memshard; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
