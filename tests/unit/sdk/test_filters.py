"""Conditions written as Python are the filters of the contract that they read as."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from google.protobuf import struct_pb2
from google.protobuf.json_format import ParseDict

from memshard import InvalidArgument, MemoryType
from memshard.filters import Field, Filter, field
from memshard.v1 import memory_pb2 as pb

_TOPIC = field("metadata.topic")
_A, _B, _C = (field(name) == 1 for name in "abc")


def _comparison(path: str, operator: str, value: Any) -> pb.Filter:
    wire = ParseDict(value, struct_pb2.Value())
    return pb.Filter(
        comparison=pb.Comparison(field=path, operator=pb.Operator.Value(f"OPERATOR_{operator}"), value=wire)
    )


@pytest.mark.parametrize(
    ("condition", "operator", "value"),
    [
        (_TOPIC == "tea", "EQ", "tea"),
        (_TOPIC == None, "EQ", None),  # noqa: E711 - JSON's null is a value of metadata.
        (_TOPIC != "tea", "NE", "tea"),
        (_TOPIC > 9, "GT", 9),
        (_TOPIC >= 9.5, "GTE", 9.5),
        (_TOPIC < 10, "LT", 10),
        (_TOPIC <= True, "LTE", True),
        (10 > _TOPIC, "LT", 10),  # noqa: SIM300 - The other way round is the same condition.
        (_TOPIC.in_(["tea", 1]), "IN", ["tea", 1]),
        (_TOPIC.not_in(("tea",)), "NOT_IN", ["tea"]),
        (_TOPIC.in_(iter(())), "IN", []),
        (_TOPIC.contains("te"), "CONTAINS", "te"),
        (_TOPIC.contains({"a": [1]}), "CONTAINS", {"a": [1]}),
        (_TOPIC.exists(), "EXISTS", True),
        (_TOPIC.exists(False), "EXISTS", False),
    ],
)
def test_comparison_is_what_it_reads_as(condition: Filter, operator: str, value: Any) -> None:
    assert condition.message() == _comparison("metadata.topic", operator, value)


def test_times_are_sent_in_utc_and_types_by_name() -> None:
    moment = datetime(2030, 1, 2, 5, 4, 5, 600_000, tzinfo=timezone(timedelta(hours=2)))
    assert (field("create_time") < moment).message() == _comparison("create_time", "LT", "2030-01-02T03:04:05.600000Z")
    second = field("create_time").in_([datetime(2030, 1, 2, tzinfo=UTC)])
    assert second.message() == _comparison("create_time", "IN", ["2030-01-02T00:00:00Z"])
    semantic = field("type") == MemoryType.SEMANTIC
    assert semantic.message() == _comparison("type", "EQ", "MEMORY_TYPE_SEMANTIC")


def test_joining_more_of_a_kind_makes_no_deeper() -> None:
    a, b, c = (condition.message() for condition in (_A, _B, _C))
    assert (_A & _B & _C).message() == pb.Filter(all_of=pb.FilterList(filters=[a, b, c]))
    assert (_A & (_B & _C)).message() == pb.Filter(all_of=pb.FilterList(filters=[a, b, c]))
    assert (_A | _B | _C).message() == pb.Filter(any_of=pb.FilterList(filters=[a, b, c]))
    assert (~_A).message() == pb.Filter(negation=a)
    mixed = pb.Filter(all_of=pb.FilterList(filters=[pb.Filter(any_of=pb.FilterList(filters=[a, b])), c]))
    assert ((_A | _B) & _C).message() == mixed


def test_conditions_are_values() -> None:
    same = field("a") == 1
    assert same == _A
    assert _A != _B
    assert len({_A, same, _B}) == 2
    _A.message().comparison.field = "changed"
    assert _A.message().comparison.field == "a"
    assert "tea" in repr(_TOPIC == "tea")
    assert repr(_TOPIC) == "field('metadata.topic')"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: _A and _B,
        lambda: not _A,
        lambda: 1 < _TOPIC < 9,
        lambda: _A & True,  # type: ignore[operator]
        lambda: {_TOPIC},
    ],
)
def test_python_that_would_mean_something_else_is_refused(mistake: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        mistake()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: datetime(2030, 1, 1) == _TOPIC,
        lambda: object() == _TOPIC,
        lambda: _TOPIC.contains(math.nan),
        lambda: _TOPIC == 2**53 + 1,
        lambda: _TOPIC == "\ud800",
        lambda: _TOPIC.in_("tea"),
        lambda: _TOPIC.in_(5),  # type: ignore[arg-type]
    ],
)
def test_value_that_cannot_be_compared_is_refused_by_the_field(mistake: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        mistake()
    assert [violation.field for violation in caught.value.field_violations] == ["metadata.topic"]


def test_field_needs_a_path() -> None:
    for path in ("", 5):
        with pytest.raises(InvalidArgument, match="field"):
            Field(path)  # type: ignore[arg-type]
