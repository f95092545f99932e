"""Who gets an index of their own, how hard it is looked through, and what its recall is."""

from hypothesis import given
from hypothesis import strategies as st

from shard.large_users.known import FEW, MANY, Effort, OwnIndex
from shard.large_users.plan import Bounds, Existing, LargeUser, Plan, decide
from shard.large_users.recall import least_recall, recall

BOUNDS = Bounds(rows=1000, most=2)
PROVEN = OwnIndex(7, ef_few=70, ef_many=220)
UNPROVEN = OwnIndex(7, ef_few=None, ef_many=None)


def user(key: int, rows: int, *, own: bool = True) -> LargeUser:
    return LargeUser(key, b"hash", key, rows, own, f"user-{key}")


def index(key: int, measured_rows: int | None = 1000) -> Existing:
    return Existing(f"memories_own_{key:016x}", key, measured_rows)


def decided(users: list[LargeUser], have: list[Existing], bounds: Bounds = BOUNDS) -> Plan:
    """For users who had as many memories at the last look."""
    return decide(users, have, bounds, {one.key: one.rows for one in users})


def keys(plan: Plan) -> tuple[list[int], list[int], list[int]]:
    return [one.key for one in plan.drop], [one.key for one in plan.measure], [one.key for one in plan.build]


def test_the_largest_get_one_from_the_threshold_on_the_largest_first() -> None:
    plan = decided([user(1, 999), user(2, 1000), user(3, 5000), user(4, 3000)], [])
    assert keys(plan) == ([], [], [3, 4])


def test_one_is_kept_until_its_user_is_half_as_large() -> None:
    assert keys(decided([user(1, 500)], [index(1, 500)])) == ([], [], [])
    assert keys(decided([], [index(1)])) == ([1], [], [])
    assert keys(decided([user(1, 499)], [index(1)])) == ([1], [], [])


def test_users_of_about_the_same_size_do_not_take_it_from_each_other() -> None:
    have = [index(1, 2000), index(2, 2000)]
    assert keys(decided([user(1, 2000), user(2, 2000), user(3, 2900)], have)) == ([], [], [])
    assert keys(decided([user(1, 2000), user(2, 2100), user(3, 3200)], have)) == ([1], [], [3])


def test_rows_that_are_on_their_way_promote_nobody_and_keep_what_the_mover_has_made() -> None:
    assert keys(decided([user(1, 9000, own=False)], [])) == ([], [], [])
    assert keys(decided([user(1, 9000, own=False)], [index(1, 9000)])) == ([], [], [])


def test_nobody_gets_one_while_an_import_is_under_way() -> None:
    assert keys(decide([user(1, 5000)], [], BOUNDS, {})) == ([], [], [])
    assert keys(decide([user(1, 5000)], [], BOUNDS, {1: 4000})) == ([], [], [])
    assert keys(decide([user(1, 5000)], [], BOUNDS, {1: 4600})) == ([], [], [1])
    # Nor does anybody lose theirs for it; and who has one keeps it.
    have = [index(2, 2000), index(3, 2000)]
    assert keys(decide([user(1, 9000), user(2, 2000), user(3, 2000)], have, BOUNDS, {})) == ([], [], [])
    assert keys(decide([user(1, 5000)], [index(1, 5000)], BOUNDS, {})) == ([], [], [])


def test_recall_is_measured_again_when_a_user_has_grown_or_shrunk() -> None:
    assert keys(decided([user(1, 1400)], [index(1, None)])) == ([], [1], [])
    assert keys(decided([user(1, 1400)], [index(1, 1000)])) == ([], [], [])
    assert keys(decided([user(1, 1600)], [index(1, 1000)])) == ([], [1], [])
    assert keys(decided([user(1, 600)], [index(1, 1000)])) == ([], [1], [])


@given(
    st.dictionaries(st.integers(0, 20), st.integers(500, 5000), max_size=12),
    st.sets(st.integers(0, 20), max_size=6),
    st.integers(0, 4),
)
def test_there_are_never_more_than_the_bound_and_nothing_is_made_and_dropped_at_once(
    rows: dict[int, int], there: set[int], most: int
) -> None:
    users = [user(key, count) for key, count in rows.items()]
    have = [index(key) for key in there]
    plan = decided(users, have, Bounds(1000, most))
    dropped, _, built = (set(some) for some in keys(plan))
    assert dropped <= there
    assert not built & there
    assert len(there - dropped | built) <= most
    # What it leads to is left as it is.
    after = [index(key) for key in there - dropped | built]
    again = decided(users, after, Bounds(1000, most))
    assert (again.drop, again.build) == ((), ())


def test_a_search_looks_as_hard_as_was_found_to_be_enough_and_else_elsewhere() -> None:
    assert PROVEN.effort(FEW, filtered=False, index_suffices=False) == Effort(70, FEW)
    assert PROVEN.effort(FEW + 1, filtered=False, index_suffices=False) == Effort(220, FEW + 1)
    assert PROVEN.effort(FEW, filtered=True, index_suffices=False) == Effort(220, MANY)
    assert PROVEN.effort(MANY + 1, filtered=False, index_suffices=False) is None
    assert UNPROVEN.effort(1, filtered=False, index_suffices=False) is None


def test_where_less_will_do_an_index_that_is_not_proven_answers_too() -> None:
    assert UNPROVEN.effort(1, filtered=False, index_suffices=True) == Effort(100, 1)
    assert UNPROVEN.effort(200, filtered=False, index_suffices=True) == Effort(400, 200)
    assert PROVEN.effort(1000, filtered=False, index_suffices=True) == Effort(1000, 1000)
    # Of more of them there are enough that pass a filter.
    assert PROVEN.effort(10, filtered=True, index_suffices=True) == Effort(1000, 500)


def test_recall_counts_what_is_as_near_as_the_farthest_that_should_be_found() -> None:
    assert recall([[0.1, 0.2]], [[0.1, 0.2, 0.3]], 2) == 1.0
    assert recall([[0.1, 0.3]], [[0.1, 0.2, 0.3]], 2) == 0.5
    assert recall([[0.1, 0.2], []], [[0.1, 0.2], [0.1, 0.2]], 2) == 0.5
    # Another one at the same distance is as good.
    assert recall([[0.1, 0.2]], [[0.1, 0.2, 0.2]], 2) == 1.0
    assert recall([], [], 2) == 0.0


def test_easy_questions_do_not_make_up_for_others() -> None:
    truths = [[0.1, 0.2]] * 6
    found, half = [0.1, 0.2], [0.1, 0.3]
    assert least_recall([found] * 6, truths, 2) == 1.0
    # They come by turns.
    assert least_recall([found, half] * 3, truths, 2) == 0.5
    assert least_recall([half, found] * 3, truths, 2) == 0.5
    assert recall([found, half] * 3, truths, 2) == 0.75
