"""Memories and filters for them, at random: the filters take their paths and values mostly from the memories."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import reduce
from typing import Any

from google.protobuf import struct_pb2
from hypothesis import assume
from hypothesis import strategies as st

from memshard.v1 import memory_pb2 as pb
from shard.rows import to_timestamp
from tests.support.filter_model import ABSENT, all_of, any_of, compare, comparisons, negation

MAX_COMPARISONS = 64
MAX_DEPTH = 8
_ALONE = 6

# What SQL, LIKE, JSON, arrays' text and collations could each take for something else.
_TRAPS = [
    *("", "a", "A", "b", "ab", "1", "1.0", "9", "10", "true", "null", "%", "_", "a%", "a_", "\\", "\\%", "'", '"'),
    *("' OR true --", "'; DROP TABLE memories; --", "$1", "{a}", "a,b", "[]", "\\u0000", "/*", "\n", "\t", "\x7f"),
    *("ä", "a\u0308", "Ä", "ß", "ss", "i", "İ", "日本", "\ud7ff", "\uffff", "\U0001f600", "e\u0301", "\u200b", "NaN"),
]
_KEYS = ["a", "0", "b", "ä", "A", "1", "-1", "%", "_", "'", '"', "$1", "{a}", "a b", "*", "metadata", "null"]
_NUMBERS = [0.0, -0.0, 1.0, -1.0, 9.0, 10.0, 0.1, 0.7, 0.5, 1e22, 1e23, 2.0**53, 2.0**53 + 2, 5e-324, 1e-7, 1.7e308]
_NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
_STEPS_US = [0, 1, 2, 999, 1000, 1_000_000, -1, -3_600_000_000]

_texts = st.sampled_from(_TRAPS) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4
)
_numbers = st.sampled_from(_NUMBERS) | st.integers(-3, 3).map(float) | st.floats(allow_nan=False, allow_infinity=False)
_of_kind: dict[type, st.SearchStrategy[Any]] = {str: _texts, float: _numbers, bool: st.booleans()}
# The first few are more likely, so that memories have some in common.
_keys = st.one_of(*[st.sampled_from(_KEYS[:4])] * 3, st.sampled_from(_KEYS), _texts)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return _leaves | st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3)


_leaves = st.one_of(*_of_kind.values(), st.none())
_deep = st.builds(reduce, st.just(lambda inner, key: {key: inner}), st.lists(_keys, min_size=4, max_size=7), _leaves)
# Not st.recursive, which draws many times more than it keeps.
_json = _nested(_nested(_nested(_leaves))) | _deep
_moments = st.sampled_from(_STEPS_US).map(lambda step: _NOON + timedelta(microseconds=step))
_timestamps = _moments.map(to_timestamp)
_ORDER = ["GT", "GTE", "LT", "LTE"]
_SETS = ["IN", "NOT_IN"]


@dataclass(frozen=True)
class Case:
    """Filters, one of them joined of many, and memories to try each of them on."""

    filters: list[pb.Filter]
    memories: list[pb.Memory]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One case; the filters are such as the router lets through."""
    memories = draw(st.lists(_memories(), min_size=1, max_size=4))
    leaves = _leaves_for(memories)
    joined = _tree(draw, leaves, MAX_DEPTH)
    assume(sum(1 for _ in comparisons(joined)) <= MAX_COMPARISONS)
    # A comparison within others seldom decides; alone, a fault in it shows.
    alone = [draw(draw(leaves)) for _ in range(_ALONE)]
    return Case([joined, *alone], memories)


@st.composite
def _memories(draw: st.DrawFn) -> pb.Memory:
    metadata = struct_pb2.Struct()
    metadata.update(draw(st.dictionaries(_keys, _json, max_size=4)))
    return pb.Memory(
        agent_id=draw(_texts),
        session_id=draw(_texts),
        type=draw(st.integers(1, 4)),  # type: ignore[arg-type]  # Hypothesis draws plain numbers.
        metadata=metadata,
        importance=draw(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]) | st.floats(0, 1, width=32)),
        create_time=draw(_timestamps),
        update_time=draw(_timestamps),
        expire_time=draw(st.none() | _timestamps),
    )


def _tree(draw: st.DrawFn, leaves: st.SearchStrategy[st.SearchStrategy[pb.Filter]], depth: int) -> pb.Filter:
    """A filter at most this deep. Not a strategy: making one for each level takes longer than drawing from it."""
    kind = draw(_KINDS) if depth > 1 else "comparison"
    if kind == "negation":
        return negation(_tree(draw, leaves, depth - 1))
    if kind in {"all_of", "any_of"}:
        inner = [_tree(draw, leaves, depth - 1) for _ in range(draw(st.integers(1, 3)))]
        return all_of(*inner) if kind == "all_of" else any_of(*inner)
    return draw(draw(leaves))


def _leaves_for(memories: list[pb.Memory]) -> st.SearchStrategy[st.SearchStrategy[pb.Filter]]:
    there: dict[str, list[Any]] = {}
    for memory in memories:
        for path, plain in _paths(_plain(struct_pb2.Value(struct_value=memory.metadata))):
            there.setdefault(path, []).append(plain)
    metadata = _of_metadata(there)
    # Not st.one_of, which would count every alternative within these.
    return st.sampled_from([*[metadata] * 4, _of_text(memories), _OF_TYPE, _OF_IMPORTANCE, _OF_TIME])


@st.composite
def _of_metadata(draw: st.DrawFn, there: dict[str, list[Any]]) -> pb.Filter:
    path = draw(_mostly(sorted(there), _SOMEWHERE))
    near = [like for plain in there.get(path, []) for like in _alike(plain)]
    operator = draw(st.sampled_from(["EQ", "NE", *_ORDER, *_SETS, "CONTAINS", "CONTAINS", "EXISTS"]))
    operand: Any = draw(st.booleans() | st.just(ABSENT))
    if operator in {"EQ", "NE"}:
        operand = draw(_mostly(near, _json))
    elif operator in _ORDER:
        operand = draw(_scalars(near, str, float))
    elif operator == "CONTAINS":
        operand = draw(_scalars([part for plain in there.get(path, []) for part in _parts(plain)], str, float, bool))
    elif operator in _SETS:
        one = draw(_scalars(near, str, float, bool))
        operand = [*draw(st.lists(_of_kind[type(one)], max_size=3)), one]
    return compare(f"metadata.{path}", operator, operand)


def _of_text(memories: list[pb.Memory]) -> st.SearchStrategy[pb.Filter]:
    values = _texts | st.sampled_from([text for memory in memories for text in (memory.agent_id, memory.session_id)])
    return _of_columns(["agent_id", "session_id"], ["EQ", "NE", *_ORDER, "CONTAINS"], values)


def _of_columns(
    fields: list[str], operators: list[str], values: st.SearchStrategy[Any]
) -> st.SearchStrategy[pb.Filter]:
    """Comparisons of columns by these operators, which all take the same values, by IN and NOT_IN, and by EXISTS."""
    some = st.sampled_from(fields)
    return st.one_of(
        *[st.builds(compare, some, st.just(operator), values) for operator in operators],
        st.builds(compare, some, st.sampled_from(_SETS), st.lists(values, min_size=1, max_size=3)),
        st.builds(compare, some, st.just("EXISTS"), st.booleans() | st.just(ABSENT)),
    )


def _scalars(near: list[Any], *types: type) -> st.SearchStrategy[Any]:
    """Values of these types."""
    return _mostly([plain for plain in near if type(plain) in types], st.one_of([_of_kind[kind] for kind in types]))


def _mostly(near: list[Any], others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of `near` in two of three draws, if there is any."""
    if not near:
        return others
    return st.integers(1, 3).flatmap(lambda side: others if side == 3 else st.sampled_from(near))


def _paths(plain: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """All that a filter can name in metadata, and what it must not find: the elements of lists."""
    items = plain.items() if isinstance(plain, dict) else [(str(index), item) for index, item in enumerate(plain)]
    for key, item in items:
        if not key or "." in key or before.count(".") == 8:
            continue
        yield before + key, item
        if isinstance(item, dict | list):
            yield from _paths(item, f"{before}{key}.")


def _plain(item: struct_pb2.Value) -> Any:
    kind = item.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _plain(inner) for key, inner in item.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(inner) for inner in item.list_value.values]
    return None if kind == "null_value" else getattr(item, str(kind))


def _alike(plain: Any) -> list[Any]:
    """A value, and what looks like it."""
    if isinstance(plain, str):
        return [plain, float(plain) if plain.isdecimal() else plain.swapcase()]
    return [plain, [plain], json.dumps(int(plain) if isinstance(plain, float) and plain.is_integer() else plain)]


def _parts(plain: Any) -> list[Any]:
    """What CONTAINS could find in a value."""
    if isinstance(plain, list):
        return plain
    return [plain[1:], plain[:1], f"{plain[:1]}%", f"_{plain[1:]}"] if isinstance(plain, str) else [plain]


def _written(moment: datetime, offset_minutes: int) -> str:
    """A moment in RFC 3339, seen from some offset."""
    text = moment.astimezone(timezone(timedelta(minutes=offset_minutes))).isoformat()
    return text if offset_minutes else text.replace("+00:00", "Z")


_KINDS = st.sampled_from(["comparison", "comparison", "all_of", "any_of", "negation"])
_SOMEWHERE = st.lists(st.sampled_from(_KEYS), min_size=1, max_size=8).map(".".join)
_TYPE_NAMES = pb.MemoryType.keys()[1:]
_OF_TYPE = _of_columns(
    ["type"],
    ["EQ", "NE"],
    st.sampled_from([*_TYPE_NAMES, *(name.removeprefix("MEMORY_TYPE_") for name in _TYPE_NAMES)]),
)
_OF_IMPORTANCE = _of_columns(["importance"], ["EQ", "NE", *_ORDER], _numbers)
_OF_TIME = _of_columns(
    ["create_time", "update_time", "expire_time"],
    ["EQ", "NE", *_ORDER],
    st.builds(_written, _moments, st.sampled_from([0, 60, -330, 1439])),
)
