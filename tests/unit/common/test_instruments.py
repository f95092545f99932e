"""Instruments without locks say what prometheus-client's own do."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.exposition import generate_latest

from common.telemetry import instruments

_BOUNDS = (0.001, 0.01, 0.1, 1.0)
_TOLD = {"trace_id": "0af7651916cd43dd8448eb211c80319c"}
# Sizes at, beside and between the bounds, and beyond them; binary fractions, whose sums are exact in any order.
_sizes = st.one_of(st.sampled_from(_BOUNDS), st.integers(0, 64).map(lambda number: number / 16))
_marked = st.tuples(st.sampled_from(["get", "store"]), _sizes, st.booleans())


def _page(of: ModuleType, steps: Callable[[Any, Any, Any], None]) -> str:
    """The page after some steps, but for the moments at which things happened."""
    registry = prometheus_client.CollectorRegistry()
    counter = of.Counter("calls", "Calls.", ("operation",), registry=registry)
    gauge = of.Gauge("open", "Open.", ("operation",), registry=registry)
    histogram = of.Histogram("took_seconds", "Took.", ("operation",), buckets=_BOUNDS, registry=registry)
    steps(counter, gauge, histogram)
    return _lasting(registry)


def _lasting(registry: prometheus_client.CollectorRegistry) -> str:
    """The page but for the moments at which things happened."""
    page = generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    page = re.sub(r"(?m)^(\w+_created\{[^}]*\}) .*$", r"\1", page)
    return re.sub(r"(# \{[^}]*\} \S+) \S+", r"\1", page)


@given(st.lists(_marked, max_size=30))
def test_the_page_is_the_librarys(marked: list[tuple[str, float, bool]]) -> None:
    def steps(counter: Any, gauge: Any, histogram: Any) -> None:
        for operation, size, is_told in marked:
            exemplar = _TOLD if is_told else None
            counter.labels(operation).inc(1, exemplar)
            histogram.labels(operation).observe(size, exemplar)
            gauge.labels(operation).inc(size)
            gauge.labels(operation).dec(0.5)

    assert _page(instruments, steps) == _page(prometheus_client, steps)


def test_a_series_that_is_removed_begins_anew() -> None:
    def steps(counter: Any, gauge: Any, histogram: Any) -> None:
        for _ in range(2):
            counter.labels("get").inc(2)
            gauge.labels("get").set(3)
            histogram.labels("get").observe(0.5)
            counter.remove("get")
            histogram.remove("get")
        counter.labels("get").inc()

    assert _page(instruments, steps) == _page(prometheus_client, steps)


def test_without_its_labels_nothing_is_counted() -> None:
    counter = instruments.Counter("calls", "Calls.", ("operation",), registry=None)
    histogram = instruments.Histogram("took_seconds", "Took.", ("operation",), registry=None)
    with pytest.raises(AttributeError):
        counter.inc()
    with pytest.raises(AttributeError):
        histogram.observe(1.0)


@given(st.lists(_marked, max_size=30))
def test_one_observation_under_several_names_is_like_one_of_each(marked: list[tuple[str, float, bool]]) -> None:
    def page(of: ModuleType, observe: Callable[[Any, Any, Any, float, dict[str, str] | None], None]) -> str:
        registry = prometheus_client.CollectorRegistry()
        counter = of.Counter("calls", "Calls.", ("operation",), registry=registry)
        took = of.Histogram("took_seconds", "Took.", ("operation",), buckets=_BOUNDS, registry=registry)
        lasted = of.Histogram("lasted_seconds", "Lasted.", ("rpc",), buckets=_BOUNDS, registry=registry)
        for operation, size, is_told in marked:
            told = _TOLD if is_told else None
            observe(counter.labels(operation), took.labels(operation), lasted.labels(operation), size, told)
        return _lasting(registry)

    def together(counter: Any, took: Any, lasted: Any, size: float, told: dict[str, str] | None) -> None:
        lasted.share(took)
        counter.count(lasted)
        lasted.observe(size, told)

    def each(counter: Any, took: Any, lasted: Any, size: float, told: dict[str, str] | None) -> None:
        counter.inc(1, told)
        took.observe(size, told)
        lasted.observe(size, told)

    assert page(instruments, together) == page(prometheus_client, each)


def test_what_has_other_buckets_is_not_the_same() -> None:
    fine = instruments.Histogram("fine", "Fine.", buckets=_BOUNDS, registry=None)
    coarse = instruments.Histogram("coarse", "Coarse.", buckets=_BOUNDS[:2], registry=None)
    with pytest.raises(ValueError, match="buckets"):
        coarse.share(fine)


def test_a_counter_counts_one_thing() -> None:
    one, other = (instruments.Histogram(name, "Took.", buckets=_BOUNDS, registry=None) for name in ("one", "other"))
    counting, used = (instruments.Counter(name, "Calls.", registry=None) for name in ("counting", "used"))
    counting.count(one)
    with pytest.raises(ValueError, match="already"):
        counting.count(other)
    used.inc()
    with pytest.raises(ValueError, match="already"):
        used.count(one)
