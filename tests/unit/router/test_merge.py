"""Merging the shards' answers: the same results as if one shard had held everything."""

import itertools
import uuid
from typing import TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.merge import merge, merge_page
from router.validate import Window

Row: TypeAlias = tuple[float, str, str]
"""Score, id, user."""

# Few values, so that there are many ties and ids that several users have.
_scores = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0])
_keys = st.tuples(st.sampled_from("abcdef"), st.sampled_from("uv"))
_everything = st.dictionaries(_keys, _scores, max_size=12).map(
    lambda found: [(score, memory_id, user_id) for (memory_id, user_id), score in found.items()]
)
_windows = st.builds(Window, st.integers(1, 6), st.integers(0, 6))


def _result(row: Row) -> pb.ScoredMemory:
    score, memory_id, user_id = row
    return pb.ScoredMemory(memory=pb.Memory(id=memory_id, user_id=user_id), score=score)


def _row(result: pb.ScoredMemory) -> Row:
    return result.score, result.memory.id, result.memory.user_id


def _ordered(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row[0], row[1], row[2]))


@given(_everything, _windows, st.data())
def test_merged_shards_answer_as_one_shard_would(rows: list[Row], window: Window, data: st.DataObject) -> None:
    placed = [data.draw(st.integers(0, 3)) for _ in rows]
    # Each shard gives its own best k, which is all that it is asked for.
    answers = [
        _ordered([row for row, place in zip(rows, placed, strict=True) if place == shard])[: window.k]
        for shard in range(4)
    ]
    merged = [_row(result) for result in merge([list(map(_result, answer)) for answer in answers], window)]
    assert merged == _ordered(rows)[window.offset : window.offset + window.limit]


@given(_everything, _windows, st.data())
def test_memory_that_several_shards_report_counts_once(rows: list[Row], window: Window, data: st.DataObject) -> None:
    twice = data.draw(st.lists(st.sampled_from(rows), unique=True)) if rows else []
    merged = merge([list(map(_result, _ordered(rows))), list(map(_result, _ordered(twice)))], window)
    assert [_row(result) for result in merged] == _ordered(rows)[window.offset : window.k]


def test_of_two_reports_of_a_memory_the_better_score_counts() -> None:
    old, new = _result((0.25, "a", "u")), _result((0.75, "a", "u"))
    between = _result((0.5, "b", "u"))
    for answers in itertools.permutations([[old], [new], [between]]):
        assert [_row(result) for result in merge(answers, Window(10, 0))] == [(0.75, "a", "u"), (0.5, "b", "u")]


def test_order_of_the_answers_does_not_matter() -> None:
    answers = [[_result((0.5, memory_id, user_id))] for memory_id in "ba" for user_id in "vu"]
    orders = {tuple(map(_row, merge(order, Window(3, 1)))) for order in itertools.permutations(answers)}
    assert orders == {((0.5, "a", "v"), (0.5, "b", "u"), (0.5, "b", "v"))}


def test_pages_of_a_search_neither_miss_nor_repeat_a_result() -> None:
    answers = [[_result((score / 10, f"{shard}{score}", "u")) for score in range(9, 0, -1)] for shard in "xyz"]
    pages = [_row(result) for offset in range(0, 27, 4) for result in merge(answers, Window(4, offset))]
    assert pages == [_row(result) for result in merge(answers, Window(27, 0))]
    assert len(set(pages)) == 27


def test_nothing_found_is_nothing() -> None:
    assert merge([], Window(10, 0)) == []
    assert merge([[], []], Window(10, 0)) == []
    assert merge([[_result((1.0, "a", "u"))]], Window(10, 1)) == []


_PAGE_SIZE, _PAGE_BYTES = 4, 600
# When a memory was made (few moments, so that there are ties), the length of its content, and its shard.
_listed = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 900), st.integers(0, 2)), max_size=30)


def _fits(page: list[pb.Memory]) -> bool:
    return len(page) <= _PAGE_SIZE and (len(page) == 1 or sum(memory.ByteSize() for memory in page) <= _PAGE_BYTES)


def _shards_page(memories: list[pb.Memory], after: shard_pb2.ListPosition | None) -> shard_pb2.ListResponse:
    """As a shard answers: newest first, and ended early by size."""
    older = [memory for memory in memories if after is None or _place(memory) < (after.create_time_us, after.id)]
    page = older[:1]
    while len(page) < len(older) and _fits(older[: len(page) + 1]):
        page = older[: len(page) + 1]
    if len(page) == len(older):
        return shard_pb2.ListResponse(memories=page)
    create_time_us, memory_id = _place(page[-1])
    return shard_pb2.ListResponse(
        memories=page, next=shard_pb2.ListPosition(create_time_us=create_time_us, id=memory_id)
    )


def _place(memory: pb.Memory) -> tuple[int, bytes]:
    return memory.create_time.ToMicroseconds(), uuid.UUID(memory.id).bytes


@given(_listed)
def test_pages_of_a_listing_over_shards_are_bounded_and_together_everything_once(
    given_rows: list[tuple[int, int, int]],
) -> None:
    shards: list[list[pb.Memory]] = [[], [], []]
    for number, (moment, length, shard) in enumerate(given_rows):
        memory = pb.Memory(id=str(uuid.UUID(int=number)), content="x" * length)
        memory.create_time.FromMicroseconds(moment)
        shards[shard].append(memory)
    for memories in shards:
        memories.sort(key=_place, reverse=True)
    listed: list[pb.Memory] = []
    after: shard_pb2.ListPosition | None = None
    for _ in range(len(given_rows) + 1):
        page, after = merge_page([_shards_page(memories, after) for memories in shards], _PAGE_SIZE, _PAGE_BYTES)
        assert _fits(page) or not page
        listed += page
        if after is None:
            break
    assert after is None
    assert [memory.id for memory in listed] == [
        memory.id for memory in sorted(itertools.chain(*shards), key=_place, reverse=True)
    ]
