"""A place in the log of a shard that gave slots away stands for one in the log of the shard that has them."""

from common.topology import Cutover
from router.consistency import EVENTUAL, Consistency, Position


def _session(**positions: tuple[int, int]) -> Consistency:
    return Consistency(strong=False, positions={name: Position(*place) for name, place in positions.items()})


def test_the_new_owner_must_have_what_it_had_at_the_cutover() -> None:
    wanted = _session(a=(1, 50)).under([Cutover("a", "b", 2, 700)])
    assert wanted.of("b").position == Position(2, 700)
    assert wanted.of("a").position == Position(1, 50)


def test_what_was_written_to_the_new_owner_since_still_counts() -> None:
    wanted = _session(a=(1, 50), b=(2, 900)).under([Cutover("a", "b", 2, 700)])
    assert wanted.of("b").position == Position(2, 900)


def test_slots_that_moved_on_are_followed_whatever_the_order() -> None:
    for cutovers in (
        [Cutover("b", "c", 1, 9), Cutover("a", "b", 1, 7)],
        [Cutover("a", "b", 1, 7), Cutover("b", "c", 1, 9)],
    ):
        wanted = _session(a=(1, 1)).under(cutovers)
        assert (wanted.of("b").position, wanted.of("c").position) == (Position(1, 7), Position(1, 9))


def test_a_ring_of_moves_comes_to_an_end() -> None:
    ring = [Cutover("a", "b", 1, 7), Cutover("b", "a", 1, 9)]
    assert _session(a=(1, 1)).under(ring).of("a").position == Position(1, 9)


def test_nothing_is_asked_of_shards_that_got_nothing_from_those_that_were_written_to() -> None:
    assert _session(a=(1, 1)).under([Cutover("x", "b", 1, 7)]).of("b").position is None
    assert EVENTUAL.under([Cutover("a", "b", 1, 7)]) == EVENTUAL
