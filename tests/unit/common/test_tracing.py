"""Traces: who is whose child, what is kept, what travels, and that nothing is noted when nobody records."""

import asyncio
import gc
from socket import gethostname
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common import tracing
from common.config import ReplicaSettings, RouterSettings, ServiceSettings, ShardSettings
from common.errors import InvalidArgument, ResourceExhausted, Unavailable
from common.telemetry.registry import REGISTRY
from common.trace_export import Export, exporting
from common.tracing import Kind, parse, parse_state
from tests.support.clock import Clock
from tests.support.otlp import OtlpReceiver, values_of

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"
DSN: Any = "postgresql://user@host/database"
TRACE = 0x0AF7651916CD43DD8448EB211C80319C
CALLER = 0xB7AD6B7169203331


class Recording:
    """An export into memory, in force until its end."""

    def __init__(self, *, sample_ratio: float = 0.0, slow_s: float = 60.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.clock = Clock()
        self._export = Export("router", self.exporter, sample_ratio=sample_ratio, slow_s=slow_s, clock=self.clock)

    async def __aenter__(self) -> "Recording":
        tracing.record(self._export)
        return self

    async def __aexit__(self, *_: object) -> None:
        tracing.record(None)
        await self._export.close()

    def names(self) -> list[str]:
        self._export._processor.force_flush()
        return [span.name for span in self.exporter.get_finished_spans()]


def call(traceparent: str = "", *, begins: bool = True) -> tracing.Span:
    return tracing.received("Service/Rpc", [("traceparent", traceparent)] if traceparent else [], begins=begins)


def dropped() -> dict[str, float]:
    name = "memory_traces_dropped_total"
    return {cause: REGISTRY.get_sample_value(name, {"cause": cause}) or 0.0 for cause in ("failed", "slow", "shed")}


async def test_a_sampled_call_is_kept_with_its_children_under_the_span_of_its_caller() -> None:
    async with Recording() as recording:
        with call(SAMPLED):
            with tracing.span("outer"), tracing.span("inner", {"memshard.shard": "shard-0"}, Kind.CLIENT) as inner:
                inner.event("retry", {"memshard.attempt": 2})
            with tracing.span("beside"):
                pass
        recording.names()
        spans = {span.name: span for span in recording.exporter.get_finished_spans()}
    assert {span.context.trace_id for span in spans.values() if span.context} == {TRACE}
    parents = {name: span.parent.span_id for name, span in spans.items() if span.parent}
    ids = {name: span.context.span_id for name, span in spans.items() if span.context}
    assert parents == {
        "Service/Rpc": CALLER,
        "outer": ids["Service/Rpc"],
        "inner": ids["outer"],
        "beside": ids["Service/Rpc"],
    }
    assert dict(spans["inner"].attributes or {}) == {"memshard.shard": "shard-0"}
    assert [event.name for event in spans["inner"].events] == ["retry"]
    assert spans["inner"].resource.attributes["service.name"] == "memshard-router"


async def test_a_call_that_is_not_sampled_is_kept_only_when_something_failed_or_it_was_slow() -> None:
    async with Recording() as recording:
        with call(UNSAMPLED), tracing.span("went well"):
            pass
        with call(UNSAMPLED), pytest.raises(InvalidArgument), tracing.span("the caller's fault"):
            raise InvalidArgument("bad")
        assert recording.names() == []
        with call(UNSAMPLED), pytest.raises(Unavailable), tracing.span("failed, and was tried again"):
            raise Unavailable("gone")
        assert set(recording.names()) == {"Service/Rpc", "failed, and was tried again"}
    async with Recording(slow_s=0.0) as recording:
        with call(UNSAMPLED):
            pass
        assert recording.names() == ["Service/Rpc"]


async def test_in_an_outage_some_of_the_failures_are_kept_and_not_all() -> None:
    async with Recording() as recording:
        for _ in range(500):
            with call(UNSAMPLED) as span:
                span.end(Unavailable("gone"))
        assert len(recording.names()) == 20
        recording.clock.pass_(1.0)
        with call(UNSAMPLED) as span:
            span.end(Unavailable("gone"))
        assert len(recording.names()) == 21


async def test_a_flood_of_refusals_leaves_room_for_what_failed_or_was_slow() -> None:
    before = dropped()
    async with Recording(slow_s=0.05) as recording:
        for _ in range(500):
            with call(UNSAMPLED), pytest.raises(ResourceExhausted), tracing.span("was refused, and then not"):
                raise ResourceExhausted("too much")
        with call(UNSAMPLED), tracing.span("failed"):
            with pytest.raises(ResourceExhausted), tracing.span("refused"):
                raise ResourceExhausted("too much")
            with pytest.raises(Unavailable), tracing.span("gone"):
                raise Unavailable("gone")
        for refused in (True, False):
            with call(UNSAMPLED) as span:
                span.started_ns -= 100_000_000
                if refused:
                    span.end(ResourceExhausted("too much"))
        assert recording.names() == [
            *("Service/Rpc", "was refused, and then not"),
            *("Service/Rpc", "failed", "refused", "gone"),
            "Service/Rpc",
        ]
    assert dropped() == {"shed": before["shed"] + 500, "failed": before["failed"], "slow": before["slow"]}


async def test_slow_calls_and_failed_ones_leave_each_other_room() -> None:
    before = dropped()
    async with Recording(slow_s=0.05) as recording:
        for _ in range(30):
            with call(UNSAMPLED) as span:
                span.end(Unavailable("gone"))
        for _ in range(30):
            with call(UNSAMPLED) as span:
                span.started_ns -= 100_000_000
        assert len(recording.names()) == 20 + 10
    assert dropped() == {"shed": before["shed"], "failed": before["failed"] + 10, "slow": before["slow"] + 20}


async def test_calls_without_a_trace_are_sampled_at_the_ratio_and_internal_ones_not_at_all() -> None:
    async with Recording(sample_ratio=0.1) as recording:
        for _ in range(2000):
            with call():
                pass
            with call(begins=False):
                pass
        assert 120 <= len(recording.names()) <= 300


async def test_what_travels_names_the_span_that_calls() -> None:
    async with Recording():
        assert tracing.outgoing() is None
        call = tracing.received("Service/Rpc", [("traceparent", SAMPLED), ("tracestate", "a=b")], begins=True)
        with call, tracing.span("client", kind=Kind.CLIENT) as client:
            assert tracing.outgoing() == (
                ("traceparent", f"00-{TRACE:032x}-{client.span_id:016x}-01"),
                ("tracestate", "a=b"),
            )


async def test_a_tracestate_travels_and_is_in_no_span_and_what_is_none_is_dropped_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Recording() as recording:
        for state, travels in (("a=alice,b=tea", "a=alice,b=tea"), ("alice@example.com likes tea", "")):
            with tracing.received("Service/Rpc", [("traceparent", SAMPLED), ("tracestate", state)], begins=True):
                assert dict(tracing.outgoing() or ()).get("tracestate", "") == travels
        assert len(recording.names()) == 2
        assert "alice" not in "".join(span.to_json() for span in recording.exporter.get_finished_spans())
    assert caplog.records == []


async def test_lines_of_a_tracestate_are_one_list() -> None:
    headers = [("traceparent", SAMPLED), ("tracestate", "a=1"), ("tracestate", "b=2")]
    with tracing.received("Service/Rpc", headers, begins=True):
        assert dict(tracing.outgoing() or ())["tracestate"] == "a=1,b=2"


async def test_what_a_sampled_trace_leads_to_is_kept_as_well() -> None:
    async with Recording() as recording:
        for wanted in (False, True):
            with call(UNSAMPLED), tracing.span("awaited") as awaited, call(SAMPLED), tracing.span("waits") as waits:
                if wanted:
                    waits.link(awaited)
        assert sorted(recording.names()) == [*["Service/Rpc"] * 3, "awaited", "waits", "waits"]


async def test_a_trace_that_is_held_ends_when_that_has_ended_for_which_it_is() -> None:
    async with Recording() as recording:
        with call(SAMPLED) as root:
            held = root.hold()
            assert held is not None
            root.hold()
        assert recording.names() == []
        root.event("retry", {})
        with held.spans[0], tracing.span("for the others"):
            pass
        held.release()
        assert recording.names() == []
        held.release()
        assert recording.names() == ["Service/Rpc", "for the others"]
        (kept, _) = recording.exporter.get_finished_spans()
    assert [event.name for event in kept.events] == ["retry"]


def test_where_nothing_is_recorded_nothing_is_held() -> None:
    with call() as root:
        assert root.hold() is None
    assert tracing.NO_SPAN.hold() is None


async def test_what_is_still_open_at_the_end_of_the_call_is_ended_and_marked() -> None:
    async with Recording() as recording:
        release = asyncio.Event()

        async def lose() -> None:
            with tracing.span("loser"):
                await release.wait()

        with call(SAMPLED):
            task = asyncio.create_task(lose())
            await asyncio.sleep(0)
        release.set()
        await task
        recording.names()
        spans = {span.name: span for span in recording.exporter.get_finished_spans()}
    assert (spans["loser"].attributes or {})["memshard.abandoned"] is True


def test_without_a_recorder_there_is_an_id_to_log_and_nothing_else() -> None:
    with call() as span:
        assert tracing.current().trace_id == span.trace_id
        assert len(span.trace_id) == 32
        assert tracing.span("child") is tracing.NO_SPAN
        assert tracing.outgoing() == (("traceparent", f"00-{span.trace_id}-{span.span_id:016x}-00"),)
    assert tracing.current() is tracing.NO_SPAN


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RouterSettings(catalog_dsn=DSN, port=1234), {"service.instance.id": f"{gethostname()}:1234"}),
        (
            ShardSettings(shard_id="shard-7", catalog_dsn=DSN, database_dsn=DSN, port=1234),
            {"service.instance.id": f"{gethostname()}:1234", "memshard.shard": "shard-7"},
        ),
        (
            ReplicaSettings(shard_id="shard-7", catalog_dsn=DSN, database_dsn=DSN, port=1235),
            {"service.instance.id": f"{gethostname()}:1235", "memshard.shard": "shard-7"},
        ),
    ],
)
async def test_spans_say_which_one_of_a_service_they_are_of(
    settings: ServiceSettings, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for named in ("", "from the environment"):
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", f"service.instance.id={named}" if named else "")
        async with OtlpReceiver() as receiver:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
            async with exporting("service", settings.model_copy(update={"traces_exporter": "otlp"})):
                with call(SAMPLED):
                    pass
            (raw,) = receiver.raw
        (spans,) = trace_service_pb2.ExportTraceServiceRequest.FromString(raw).resource_spans
        said = values_of(spans.resource.attributes)
        assert said["service.name"] == "memshard-service"
        if named:
            expected = {**expected, "service.instance.id": named}
        assert expected.items() <= said.items()


async def test_a_part_of_a_trace_is_bounded() -> None:
    async with Recording() as recording:
        with call(SAMPLED):
            for _ in range(3 * tracing.MOST_SPANS):
                with tracing.span("one of many"):
                    pass
        assert len(recording.names()) <= tracing.MOST_SPANS


def test_a_traceparent_is_read_as_the_standard_says() -> None:
    assert parse(SAMPLED) == (TRACE, CALLER, True)
    assert parse(UNSAMPLED) == (TRACE, CALLER, False)
    assert parse("01" + SAMPLED[2:] + "-more") == (TRACE, CALLER, True)
    for bad in (
        "",
        SAMPLED.upper(),
        SAMPLED + "-more",
        "ff" + SAMPLED[2:],
        SAMPLED.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        SAMPLED.replace("b7ad6b7169203331", "0" * 16),
        SAMPLED[:-1],
        SAMPLED + "\n",
    ):
        assert parse(bad) is None, bad


@given(st.text(max_size=80))
def test_any_text_is_a_traceparent_or_is_not(text: str) -> None:
    assert parse(text) is None or len(text) >= 55


def test_a_tracestate_is_read_as_the_standard_says() -> None:
    most = ",".join(f"k{number}=v" for number in range(32))
    for good in (
        "",
        "a=b",
        "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
        "0tenant@system-1/x*_=a b:;",
        most,
        "a=" + 256 * "v",
    ):
        assert parse_state(good) == good
    assert parse_state(" a=b \t,, c=d,") == "a=b,c=d"
    for bad in (
        "a",
        "a=",
        "=b",
        "A=b",
        "a b=c",
        "a=b=c",
        "a=é",
        "a=b\n",
        "a=b,a=c",
        "a=b,alice@example.com likes tea",
        "@a=b",
        "k" * 257 + "=v",
        "a=" + 257 * "v",
        most + ",k=v",
        ",".join(f"k{number}={'v' * 60}" for number in range(9)),
    ):
        assert parse_state(bad) == "", bad


@given(st.text(max_size=600))
def test_what_travels_of_any_text_travels_on(text: str) -> None:
    assert parse_state(parse_state(text)) == parse_state(text)


async def test_what_is_not_kept_leaves_nothing_to_the_garbage_collector() -> None:
    async with Recording():
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                with call(), tracing.span("within"):
                    pass
            assert gc.collect() < 100
        finally:
            gc.enable()


@pytest.mark.parametrize(("sample_ratio", "names"), [(1.0, ["Service/Rpc"]), (0.0, [])])
async def test_what_is_held_by_a_trace_that_has_ended_ends_nothing_again(sample_ratio: float, names: list[str]) -> None:
    async with Recording(sample_ratio=sample_ratio) as recording:
        with call() as root:
            pass
        held = root.hold()
        assert held is not None
        held.release()
        assert recording.names() == names
