"""Whom a read is sent to: the fresh before the hopeful, the least busy first, and nobody left out."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from router.balance import PRIMARY, Outlook, Standing, order
from router.consistency import Position, Wanted

_positions = st.builds(Position, st.integers(1, 3), st.integers(0, 5))
_wanted = st.builds(Wanted, st.none() | _positions, st.sampled_from([0, 100, 1000]))
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("looked"), _positions, st.integers(0, 2000)),
        st.tuples(st.sampled_from(["proved", "refusing"]), _wanted),
        st.tuples(st.just("suspected")),
    ),
    max_size=6,
)


@st.composite
def _standings(draw: st.DrawFn) -> Standing:
    """What is known of a replica after a few things have been heard of it."""
    standing = Standing(draw(_positions), draw(st.integers(0, 2000)))
    for name, *arguments in draw(_steps):
        standing = getattr(standing, name)(*arguments)
    return standing


_replicas = st.dictionaries(st.sampled_from("abcd"), _standings())
_outstanding = st.dictionaries(st.sampled_from([*"abcd", PRIMARY]), st.integers(0, 3))


@given(_wanted, _replicas, _outstanding, st.integers(0, 1000), st.booleans())
def test_the_order_names_whom_it_should(
    wanted: Wanted, replicas: dict[str, Standing], outstanding: dict[str, int], turn: int, share: bool
) -> None:
    found = order(wanted, replicas, outstanding, turn=turn, share=share)
    asked = [name for name in found.first if name != PRIMARY]
    assert set(asked) == {
        name for name, r in replicas.items() if r.outlook(wanted) is not Outlook.BEHIND and not r.suspect
    }
    assert len(set(found.first)) == len(found.first)
    # The primary is never among the first unless it takes its share.
    assert (PRIMARY in found.first) == (share and bool(asked))
    # When it does not answer, every replica that serves is a last resort, whoever is furthest first.
    assert sorted(found.last) == sorted(replicas)
    positions = [replicas[name].position for name in found.last]
    assert positions == sorted(positions, reverse=True)


@given(_wanted, _replicas, _outstanding, st.integers(0, 1000), st.booleans())
def test_the_fresh_go_first_and_among_them_the_least_busy(
    wanted: Wanted, replicas: dict[str, Standing], outstanding: dict[str, int], turn: int, share: bool
) -> None:
    found = order(wanted, replicas, outstanding, turn=turn, share=share)
    keys = [
        (Outlook.FRESH if name == PRIMARY else replicas[name].outlook(wanted), outstanding.get(name, 0))
        for name in found.first
    ]
    assert keys == sorted(keys)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_equals_take_turns(turn: int, count: int) -> None:
    replicas = {f"r{n}": Standing(Position(1, 1), 0) for n in range(count)}
    first = Counter(order(Wanted(), replicas, {}, turn=turn + n, share=False).first[0] for n in range(count * 3))
    assert first == dict.fromkeys(replicas, 3)


def test_a_primary_that_takes_its_share_is_chosen_when_the_replicas_are_busier() -> None:
    replicas = {"a": Standing(Position(1, 1), 0)}
    assert order(Wanted(), replicas, {"a": 2, PRIMARY: 1}, turn=0, share=True).first == (PRIMARY, "a")
    assert order(Wanted(), replicas, {"a": 1, PRIMARY: 1}, turn=0, share=True).first == ("a", PRIMARY)
    assert order(Wanted(), replicas, {"a": 2, PRIMARY: 1}, turn=0, share=False).first == ("a",)


def test_a_later_timeline_is_ahead_of_every_position_on_an_earlier_one() -> None:
    replica = Standing(Position(2, 5), 0)
    assert replica.outlook(Wanted(Position(1, 1000))) is Outlook.FRESH
    assert replica.outlook(Wanted(Position(3, 1))) is Outlook.HOPEFUL


def test_what_a_replica_refused_is_not_asked_of_it_again_until_it_has_got_there() -> None:
    replica = Standing(Position(1, 10), 0).refusing(Wanted(Position(1, 20)))
    assert replica.outlook(Wanted(Position(1, 10))) is Outlook.FRESH
    assert replica.outlook(Wanted(Position(1, 15))) is Outlook.HOPEFUL
    assert replica.outlook(Wanted(Position(1, 20))) is Outlook.BEHIND
    assert replica.outlook(Wanted(Position(1, 25))) is Outlook.BEHIND
    still = replica.looked(Position(1, 19), 300)
    assert still.outlook(Wanted(Position(1, 20))) is Outlook.BEHIND
    assert still.looked(Position(1, 20), 10).outlook(Wanted(Position(1, 25))) is Outlook.HOPEFUL


def test_a_replica_that_has_gone_back_is_not_believed_before_it_says_where_it_is() -> None:
    """A standby that was started again may serve from before where it was."""
    replica = Standing(Position(1, 30), 0).refusing(Wanted(Position(1, 20)))
    assert replica.outlook(Wanted(Position(1, 20))) is Outlook.BEHIND
    assert replica.outlook(Wanted(Position(1, 19))) is Outlook.FRESH


def test_a_read_proves_where_a_replica_is() -> None:
    replica = Standing(Position(1, 10), 0).proved(Wanted(Position(1, 20)))
    assert replica.outlook(Wanted(Position(1, 20))) is Outlook.FRESH
    assert replica.outlook(Wanted(Position(1, 21))) is Outlook.HOPEFUL


def test_staleness_is_what_the_replica_last_said() -> None:
    replica = Standing(Position(1, 10), 400)
    assert replica.outlook(Wanted(max_staleness_ms=400)) is Outlook.FRESH
    assert replica.outlook(Wanted(max_staleness_ms=399)) is Outlook.BEHIND
    refused = replica.refusing(Wanted(max_staleness_ms=500))
    assert refused.outlook(Wanted(max_staleness_ms=500)) is Outlook.BEHIND
    assert refused.outlook(Wanted(max_staleness_ms=600)) is Outlook.FRESH
    assert refused.looked(Position(1, 11), 100).outlook(Wanted(max_staleness_ms=100)) is Outlook.FRESH


def test_whoever_asks_for_nothing_may_ask_anybody() -> None:
    replica = Standing(Position(1, 10), 30_000).refusing(Wanted(Position(1, 11), 10))
    assert replica.outlook(Wanted()) is Outlook.FRESH
