"""What a filter may be: every fault has its reason and names its place; the bounds themselves are valid."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import struct_pb2

from common.errors import InvalidArgument
from memshard.v1 import memory_pb2 as pb
from router.filters import (
    MAX_COMPARISONS,
    MAX_DEPTH,
    MAX_LIST_ITEMS,
    MAX_PATH_PART_BYTES,
    MAX_PATH_PARTS,
    MAX_VALUE_BYTES,
    check,
)
from tests.support.filter_model import ABSENT, all_of, any_of, compare, negation

_LEAF = compare("metadata.a", "EQ", 1)
_NOON = "2026-07-01T12:30:15Z"


def _nested(depth: int, *, kinds: str = "nao") -> pb.Filter:
    """A filter of this depth, in which the kinds take turns."""
    wraps: dict[str, Callable[[pb.Filter], pb.Filter]] = {"n": negation, "a": all_of, "o": any_of}
    made = _LEAF
    for level in range(depth - 1):
        made = wraps[kinds[level % len(kinds)]](made)
    return made


def _of(field: str, operator: int, operand: struct_pb2.Value | None = None) -> pb.Filter:
    """A comparison with what the wire may hold and `compare` does not make."""
    comparison = pb.Comparison(field=field, value=operand)
    comparison.operator = operator  # type: ignore[assignment]  # A number of no operator.
    return pb.Filter(comparison=comparison)


def _list_with_unset() -> struct_pb2.Value:
    made = struct_pb2.Value()
    made.list_value.values.add()
    return made


_ANYTHING: list[Any] = ["", 0, False, None, [], {}, [[1, None]], {"a": []}]
_VALID: list[tuple[str, pb.Filter]] = [
    ("64 comparisons", all_of(*[_LEAF] * MAX_COMPARISONS)),
    ("64 in two lists", any_of(all_of(*[_LEAF] * 32), all_of(*[_LEAF] * 32))),
    ("8 deep", _nested(MAX_DEPTH)),
    ("8 negations deep", _nested(MAX_DEPTH, kinds="n")),
    ("a path of 8 keys", compare("metadata." + ".".join("k" * MAX_PATH_PARTS), "EXISTS")),
    ("a key of 256 bytes", compare("metadata." + "ü" * (MAX_PATH_PART_BYTES // 2), "EXISTS")),
    ("keys of any characters", compare("metadata.a b.$1.'.0.*.metadata", "EXISTS")),
    ("a string of 64 KiB", compare("metadata.a", "EQ", "x" * MAX_VALUE_BYTES)),
    ("256 items", compare("metadata.a", "IN", ["x"] * MAX_LIST_ITEMS)),
    ("one item", compare("metadata.a", "NOT_IN", [True])),
    *[
        (f"metadata {name} {plain!r}", compare("metadata.a", name, plain))
        for name in ("EQ", "NE")
        for plain in _ANYTHING
    ],
    *[(f"metadata {name} number", compare("metadata.a", name, 1)) for name in ("GT", "GTE", "LT", "LTE", "CONTAINS")],
    *[(f"metadata {name} string", compare("metadata.a", name, "")) for name in ("GT", "GTE", "LT", "LTE", "CONTAINS")],
    ("metadata CONTAINS boolean", compare("metadata.a", "CONTAINS", False)),
    *[
        (f"{field} {name}", compare(field, name, "a"))
        for field in ("agent_id", "session_id")
        for name in ("EQ", "NE", "GT", "GTE", "LT", "LTE", "CONTAINS")
    ],
    ("agent_id IN", compare("agent_id", "IN", ["a", ""])),
    *[(f"type {name}", compare("type", "EQ", name)) for name in ("EPISODIC", "WORKING", "MEMORY_TYPE_SEMANTIC")],
    ("type NOT_IN", compare("type", "NOT_IN", ["PROCEDURAL", "MEMORY_TYPE_PROCEDURAL"])),
    *[(f"importance {name}", compare("importance", name, -1e300)) for name in ("EQ", "NE", "GT", "GTE", "LT", "LTE")],
    ("importance IN", compare("importance", "IN", [0, 1])),
    *[
        (f"{field} {name}", compare(field, name, _NOON))
        for field in ("create_time", "update_time", "expire_time")
        for name in ("EQ", "NE", "GT", "GTE", "LT", "LTE")
    ],
    ("expire_time IN", compare("expire_time", "IN", [_NOON, _NOON])),
    *[
        (f"EXISTS of {field}, {operand!r}", compare(field, "EXISTS", operand))
        for field in ("metadata.a", "agent_id", "session_id", "type", "importance", "create_time", "expire_time")
        for operand in (True, False, ABSENT)
    ],
    *[
        (f"the time {text}", compare("create_time", "EQ", text))
        for text in (
            "2026-07-01T12:30:15.1Z",
            "2026-07-01T12:30:15.123456789Z",
            "2026-07-01T12:30:15+00:00",
            "2026-07-01T12:30:15-23:59",
            "2024-02-29T00:00:00Z",
            "0001-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999999Z",
        )
    ],
]

_VALUE = "filter.comparison.value"
_ITEM = "filter.comparison.value.list_value.values"

# What, the filter, its reason, its place.
_FAULTY: list[tuple[str, pb.Filter, str, str]] = [
    ("nothing", pb.Filter(), "INVALID_FILTER", "filter"),
    ("nothing inside", all_of(_LEAF, pb.Filter()), "INVALID_FILTER", "filter.all_of.filters[1]"),
    ("nothing negated", negation(pb.Filter()), "INVALID_FILTER", "filter.negation"),
    ("an empty all_of", all_of(), "INVALID_FILTER", "filter.all_of.filters"),
    ("an empty any_of", negation(any_of()), "INVALID_FILTER", "filter.negation.any_of.filters"),
    ("65 comparisons", all_of(*[_LEAF] * 65), "FILTER_TOO_LARGE", "filter"),
    ("65 in two lists", any_of(all_of(*[_LEAF] * 32), all_of(*[_LEAF] * 33)), "FILTER_TOO_LARGE", "filter"),
    ("9 deep", _nested(9, kinds="n"), "FILTER_TOO_DEEP", "filter" + ".negation" * 8),
    ("9 lists deep", _nested(9, kinds="a"), "FILTER_TOO_DEEP", "filter" + ".all_of.filters[0]" * 8),
    *[
        (f"the field {name!r}", compare(name, "EXISTS"), "UNKNOWN_FILTER_FIELD", "filter.comparison.field")
        for name in ("", "metadata", "content", "user_id", "id", "agent_id.a", "Type", "metadata_a", " type")
    ],
    *[
        (f"the path {name!r:.40}", compare(name, "EXISTS"), "INVALID_FILTER", "filter.comparison.field")
        for name in (
            "metadata.",
            "metadata..a",
            "metadata.a.",
            "metadata." + ".".join("k" * 9),
            "metadata." + "k" * 257,
            "metadata." + "ü" * 129,
            "metadata.a\0",
        )
    ],
    (
        "a field of more than 64 KiB",
        compare("metadata." + "k" * MAX_VALUE_BYTES, "EXISTS"),
        "FILTER_TOO_LARGE",
        "filter.comparison.field",
    ),
    ("no operator", _of("type", 0), "UNKNOWN_OPERATOR", "filter.comparison.operator"),
    ("an operator of tomorrow", _of("metadata.a", 11), "UNKNOWN_OPERATOR", "filter.comparison.operator"),
    ("an operator below zero", _of("metadata.a", -1), "UNKNOWN_OPERATOR", "filter.comparison.operator"),
    (
        "an operator deep inside",
        any_of(_LEAF, negation(all_of(_LEAF, _LEAF, _of("type", 0)))),
        "UNKNOWN_OPERATOR",
        "filter.any_of.filters[1].negation.all_of.filters[2].comparison.operator",
    ),
    *[
        (f"{field} {name}", compare(field, name, operand), "WRONG_FILTER_TYPE", "filter.comparison.operator")
        for field, names, operand in (
            ("type", ("GT", "GTE", "LT", "LTE", "CONTAINS"), "EPISODIC"),
            ("importance", ("CONTAINS",), 1),
            ("create_time", ("CONTAINS",), _NOON),
        )
        for name in names
    ],
    *[
        (f"{field} {name} {operand!r:.30}", compare(field, name, operand), "WRONG_FILTER_TYPE", _VALUE)
        for field, name, operand in (
            ("metadata.a", "EQ", ABSENT),
            ("metadata.a", "GT", True),
            ("metadata.a", "GTE", None),
            ("metadata.a", "LT", [1]),
            ("metadata.a", "LTE", {}),
            ("metadata.a", "CONTAINS", None),
            ("metadata.a", "CONTAINS", ["a"]),
            ("metadata.a", "CONTAINS", {"a": 1}),
            ("metadata.a", "IN", "a"),
            ("metadata.a", "IN", ABSENT),
            ("metadata.a", "NOT_IN", []),
            ("metadata.a", "EXISTS", "true"),
            ("metadata.a", "EXISTS", 1),
            ("metadata.a", "EXISTS", None),
            ("agent_id", "EQ", 1),
            ("agent_id", "EQ", None),
            ("session_id", "CONTAINS", True),
            ("type", "EQ", 1),
            ("type", "EQ", "episodic"),
            ("type", "EQ", "UNSPECIFIED"),
            ("type", "EQ", "MEMORY_TYPE_UNSPECIFIED"),
            ("type", "EQ", "MEMORY_TYPE_MEMORY_TYPE_EPISODIC"),
            ("type", "NE", ""),
            ("importance", "GT", "0.5"),
            ("importance", "EQ", None),
            ("create_time", "GT", 1_751_373_015),
            *[
                ("create_time", "GT", text)
                for text in (
                    "",
                    "2026-07-01",
                    "2026-07-01T12:30:15",
                    "2026-07-01 12:30:15Z",
                    "2026-07-01t12:30:15z",
                    "2026-07-01T12:30Z",
                    "2026-07-01T12:30:15.Z",
                    "2026-07-01T12:30:15.1234567890Z",
                    "2026-07-01T12:30:15,5Z",
                    "2026-07-01T12:30:15+0000",
                    "2026-07-01T12:30:15+24:00",
                    "2026-07-01T12:30:15 Z",
                    "2026-07-01T12:30:15Z\n",
                    "2026-07-01T24:00:00Z",
                    "2016-12-31T23:59:60Z",
                    "2026-02-29T00:00:00Z",
                    "0000-01-01T00:00:00Z",
                    "0001-01-01T00:00:00+00:01",
                    "9999-12-31T23:59:59-00:01",
                    "+2026-07-01T12:30:15Z",
                    "٢٠٢٦-07-01T12:30:15Z",
                    "now",
                )
            ],
        )
    ],
    *[
        (f"{field} IN {operand!r:.30}", compare(field, "IN", operand), "WRONG_FILTER_TYPE", f"{_ITEM}[{index}]")
        for field, operand, index in (
            ("metadata.a", [None], 0),
            ("metadata.a", [1, None], 1),
            ("metadata.a", ["a", 1], 1),
            ("metadata.a", [True, True, 1], 2),
            ("metadata.a", [[1]], 0),
            ("metadata.a", [{}], 0),
            ("agent_id", ["a", 1], 1),
            ("type", ["EPISODIC", "OTHER"], 1),
            ("importance", [0.5, "0.5"], 1),
            ("expire_time", [_NOON, "soon"], 1),
        )
    ],
    ("257 items", compare("metadata.a", "IN", [1] * 257), "FILTER_TOO_LARGE", _VALUE),
    ("a longer string", compare("metadata.a", "NE", "x" * 65537), "FILTER_TOO_LARGE", _VALUE),
    ("a longer string in few characters", compare("agent_id", "EQ", "€" * 21846), "FILTER_TOO_LARGE", _VALUE),
    ("a longer string in a list", compare("agent_id", "IN", ["", "x" * 65537]), "FILTER_TOO_LARGE", f"{_ITEM}[1]"),
    ("a larger list", compare("metadata.a", "EQ", ["x" * 40_000] * 2), "FILTER_TOO_LARGE", _VALUE),
    ("a larger object", compare("metadata.a", "EQ", {"x" * 40_000: "x" * 40_000}), "FILTER_TOO_LARGE", _VALUE),
    ("NUL", compare("metadata.a", "CONTAINS", "a\0"), "INVALID_FILTER", _VALUE),
    ("NUL in a list", compare("agent_id", "IN", ["a", "\0"]), "INVALID_FILTER", f"{_ITEM}[1]"),
    ("NUL deeper", compare("metadata.a", "EQ", [{"a": ["\0"]}]), "INVALID_FILTER", _VALUE),
    ("NUL in a key", compare("metadata.a", "EQ", [{"\0": 1}]), "INVALID_FILTER", _VALUE),
    ("NaN", compare("metadata.a", "EQ", math.nan), "INVALID_FILTER", _VALUE),
    ("infinity", compare("importance", "LT", math.inf), "INVALID_FILTER", _VALUE),
    ("infinity in a list", compare("importance", "IN", [1, -math.inf]), "INVALID_FILTER", f"{_ITEM}[1]"),
    ("NaN deeper", compare("metadata.a", "NE", {"a": [math.nan]}), "INVALID_FILTER", _VALUE),
    ("a value of no kind", _of("metadata.a", pb.OPERATOR_EQ, struct_pb2.Value()), "WRONG_FILTER_TYPE", _VALUE),
    ("a value of no kind deeper", _of("metadata.a", pb.OPERATOR_EQ, _list_with_unset()), "INVALID_FILTER", _VALUE),
    ("an item of no kind", _of("type", pb.OPERATOR_IN, _list_with_unset()), "WRONG_FILTER_TYPE", f"{_ITEM}[0]"),
]


@pytest.mark.parametrize("filter", [pytest.param(filter, id=name) for name, filter in _VALID])
def test_valid_filter_passes(filter: pb.Filter) -> None:
    check(filter)


@pytest.mark.parametrize(("filter", "reason", "place"), [pytest.param(*rest, id=name) for name, *rest in _FAULTY])
def test_fault_is_named(filter: pb.Filter, reason: str, place: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        check(filter)
    assert raised.value.reason == reason
    assert [violation.field for violation in raised.value.violations] == [place]


def test_place_begins_with_the_name_of_the_filter_s_field() -> None:
    with pytest.raises(InvalidArgument) as raised:
        check(negation(_of("type", 0)), "request.filter")
    assert raised.value.violations[0].field == "request.filter.negation.comparison.operator"


def test_message_repeats_nothing_long_that_the_caller_wrote() -> None:
    long: Any = "x" * 5000
    for filter in (compare(long, "EXISTS"), compare("type", "EQ", long), compare(f"metadata.{long}", "EQ", 1)):
        with pytest.raises(InvalidArgument) as raised:
            check(filter)
        assert len(raised.value.message) < 300
