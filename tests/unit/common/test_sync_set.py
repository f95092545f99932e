"""Whatever was acknowledged is on the standby that is promoted."""

from hypothesis import given
from hypothesis import strategies as st

from common.sync_set import Progress, SyncSet, promotable, required, setting

_NAMES = ["a", "b", "c", "d", "e"]
_SETS = st.frozensets(st.sampled_from(_NAMES))


@st.composite
def _situations(draw: st.DrawFn) -> tuple[SyncSet, frozenset[str], frozenset[str]]:
    """A sync set, those that have an acknowledged commit (by the set or the one that follows), those reached."""
    members, following = draw(_SETS), draw(st.none() | _SETS)
    waited_for = members if following is None else draw(st.sampled_from([members, following]))
    acked = draw(
        st.lists(st.sampled_from(sorted(waited_for)), min_size=required(len(waited_for)), unique=True)
        if waited_for
        else st.just([])
    )
    return SyncSet("p", members, following), frozenset(acked), draw(_SETS)


@given(_situations())
def test_who_is_promoted_has_every_acknowledged_commit(
    situation: tuple[SyncSet, frozenset[str], frozenset[str]],
) -> None:
    sync_set, acked, reached = situation
    chosen = promotable(sync_set, {name: Progress(1, 200 if name in acked else 100) for name in reached})
    if chosen is not None and acked:
        assert chosen in acked


@given(_SETS.filter(bool))
def test_when_all_are_reached_somebody_can_be_promoted(members: frozenset[str]) -> None:
    assert promotable(SyncSet("p", members), {name: Progress(1, 1) for name in members}) in members


def test_nobody_is_promoted_when_commits_wait_for_nobody() -> None:
    assert promotable(SyncSet("p", frozenset()), {"a": Progress(1, 1)}) is None
    assert promotable(SyncSet("p", frozenset("a"), frozenset()), {"a": Progress(1, 1)}) is None


def test_a_server_outside_the_set_is_never_promoted_however_far_it_is() -> None:
    assert promotable(SyncSet("p", frozenset("a")), {"a": Progress(1, 1), "b": Progress(2, 9)}) == "a"


def test_a_later_timeline_counts_for_more_than_a_larger_lsn() -> None:
    reached = {"a": Progress(1, 900), "b": Progress(2, 100)}
    assert promotable(SyncSet("p", frozenset("ab")), reached) == "b"


def test_the_setting_names_a_majority_of_all_servers() -> None:
    assert [required(n) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert setting(frozenset()) == ""
    assert setting(frozenset({"pg-1", 'o"dd'})) == 'ANY 1 ("o""dd", "pg-1")'
