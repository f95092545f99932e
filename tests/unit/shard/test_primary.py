"""Which server is followed: the one with the newest timeline, and never an older one than was seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard.primary import choose

A, B, C = ("a", 1), ("b", 1), ("c", 1)


@pytest.mark.parametrize(
    ("timelines", "newest", "current", "chosen"),
    [
        ({A: 1, B: 0}, 0, A, A),
        ({A: 0, B: 0}, 0, A, None),
        ({A: 1, B: 2}, 1, A, B),  # The old primary still takes writes.
        ({A: 1, B: 0}, 2, B, None),  # Its successor is gone, and it is not gone back to.
        ({A: 2, B: 2}, 2, B, B),
        ({A: 3, B: 0}, 2, B, A),
    ],
)
def test_the_server_to_follow(
    timelines: dict[tuple[str, int], int], newest: int, current: tuple[str, int], chosen: tuple[str, int] | None
) -> None:
    assert choose(timelines, newest, current) == chosen


@given(st.lists(st.dictionaries(st.sampled_from([A, B, C]), st.integers(0, 5), min_size=1), min_size=1))
def test_timelines_never_go_back(looks: list[dict[tuple[str, int], int]]) -> None:
    newest, current = 0, A
    for timelines in looks:
        chosen = choose(timelines, newest, current)
        if chosen is not None:
            assert timelines[chosen] >= max(newest, 1)
            newest, current = timelines[chosen], chosen
