"""Sessions against shards that count: whatever order receipts come in, a read is told to see every write before it."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from memshard._sessions import LOST, MAX_TOKENS, Session, Sessions

_SHARDS = ("a", "b", "c")
_USERS = ("u", "v", "w")


def _token(positions: Mapping[str, int]) -> bytes:
    return json.dumps(positions, sort_keys=True).encode()


def _positions(tokens: tuple[bytes, ...]) -> dict[str, int]:
    merged: dict[str, int] = {}
    for token in tokens:
        for shard, lsn in json.loads(token).items():
            merged[shard] = max(merged.get(shard, 0), lsn)
    return merged


class _Write:
    """A write under way: its positions are read after its commits, some time before its receipt arrives."""

    def __init__(self, client: int, users: set[str], shards: set[str], began: int) -> None:
        self.client, self.users, self.shards, self.began = client, users, shards, began
        self.positions: dict[str, int] = {}


class _Cluster(RuleBasedStateMachine):
    """Two clients, with room for two sessions each, write side by side and hand their sessions over."""

    writes = Bundle("writes")

    def __init__(self) -> None:
        super().__init__()
        self.clients = [Sessions(max_users=2) for _ in range(2)]
        self.lsn = dict.fromkeys(_SHARDS, 0)
        # What a read of each client and user has to see; None: of all users.
        self.seen: list[dict[str | None, dict[str, int]]] = [{user: {} for user in (*_USERS, None)} for _ in range(2)]

    @rule(
        target=writes,
        client=st.integers(0, 1),
        users=st.sets(st.sampled_from(_USERS), min_size=1, max_size=2),
        shards=st.sets(st.sampled_from(_SHARDS), min_size=1, max_size=2),
    )
    def begins(self, client: int, users: set[str], shards: set[str]) -> _Write:
        return _Write(client, users, shards, self.clients[client].moment())

    @rule(write=writes)
    def commits(self, write: _Write) -> None:
        for shard in write.shards - write.positions.keys():
            self.lsn[shard] += 1
            write.positions[shard] = self.lsn[shard]

    @rule(write=consumes(writes), known=st.booleans())
    def is_acknowledged(self, write: _Write, known: bool) -> None:
        self.commits(write)
        covers = frozenset(write.shards) if known else None
        self.clients[write.client].wrote(sorted(write.users), _token(write.positions), covers, began=write.began)
        for user in (*write.users, None):
            self._must_see(write.client, user, write.positions)

    @rule(client=st.integers(0, 1), user=st.sampled_from((*_USERS, None)), told=st.booleans())
    def reads(self, client: int, user: str | None, told: bool) -> None:
        sent = self.clients[client].to_send(user)
        if sent.tokens is None or not sent.tokens:
            return
        positions = _positions(sent.tokens)
        one = _token(positions) if len(sent.tokens) > 1 else None
        self.clients[client].heard(sent, one, frozenset(positions) if told else None)
        if one and user is not None:
            assert len(self.clients[client].tokens(user)) <= MAX_TOKENS

    @rule(client=st.integers(0, 1), user=st.sampled_from(_USERS))
    def hands_over(self, client: int, user: str) -> None:
        other = 1 - client
        self.clients[other].join(user, self.clients[client].tokens(user))
        for reader in (user, None):
            self._must_see(other, reader, self.seen[client][user])

    def _must_see(self, client: int, user: str | None, positions: Mapping[str, int]) -> None:
        seen = self.seen[client][user]
        for shard, lsn in positions.items():
            seen[shard] = max(seen.get(shard, 0), lsn)

    @invariant()
    def reads_see_what_was_acknowledged_before(self) -> None:
        for client, seen in zip(self.clients, self.seen, strict=True):
            for user, must in seen.items():
                sent = client.to_send(user)
                if sent.tokens is None:
                    continue  # The primary sees everything.
                assert len(sent.tokens) <= MAX_TOKENS
                carried = _positions(sent.tokens)
                assert all(carried.get(shard, 0) >= lsn for shard, lsn in must.items())


_Cluster.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_reads_see_every_write_that_was_acknowledged_before = _Cluster.TestCase


def _wrote(sessions: Sessions, lsn: int, shard: str = "a", user: str = "u", began: int | None = None) -> None:
    began = sessions.moment() if began is None else began
    sessions.wrote([user], _token({shard: lsn}), frozenset({shard}), began=began)


def test_one_token_stands_for_all_writes_that_came_one_after_the_other() -> None:
    sessions = Sessions()
    for lsn in range(10_000):
        _wrote(sessions, lsn)
    assert sessions.tokens("u") == (_token({"a": 9_999}),)
    assert sessions.to_send(None).tokens == (_token({"a": 9_999}),)


def test_writes_side_by_side_keep_a_token_each_until_a_later_one() -> None:
    sessions = Sessions()
    began = [sessions.moment() for _ in range(3)]
    for lsn, moment in zip((3, 1, 2), began, strict=True):
        _wrote(sessions, lsn, began=moment)
    assert len(sessions.tokens("u")) == 3
    _wrote(sessions, 4)
    assert sessions.tokens("u") == (_token({"a": 4}),)


def test_a_token_of_another_shard_stays() -> None:
    sessions = Sessions()
    _wrote(sessions, 1, "a")
    _wrote(sessions, 1, "b")
    assert len(sessions.tokens("u")) == 2


def test_more_than_a_read_can_carry_makes_it_strong_until_a_later_write_stands_for_them() -> None:
    sessions = Sessions()
    began = [sessions.moment() for _ in range(MAX_TOKENS + 10)]
    for lsn, moment in enumerate(began):
        _wrote(sessions, lsn, began=moment)
    assert sessions.to_send("u").tokens is None
    assert len(sessions.tokens("u")) == MAX_TOKENS
    assert LOST in sessions.tokens("u")
    other = Sessions()
    other.join("u", sessions.tokens("u"))
    assert other.to_send("u").tokens is None
    _wrote(sessions, 1_000)
    assert sessions.to_send("u").tokens == (_token({"a": 1_000}),)


def test_a_user_whose_session_had_to_make_room_still_sees_their_writes() -> None:
    sessions = Sessions(max_users=2)
    for lsn, user in enumerate("uvwxy"):
        _wrote(sessions, lsn, user=user)
    assert sessions.to_send("u").tokens == (_token({"a": 2}),)  # The latest of those that went stands for all of them.
    assert sessions.to_send("y").tokens == (_token({"a": 4}),)


def test_nothing_is_asked_for_where_nothing_was_written() -> None:
    sessions = Sessions()
    _wrote(sessions, 1, user="u")
    assert sessions.to_send("v").tokens == ()
    sessions.wrote(["v"], b"", None, began=sessions.moment())
    assert sessions.to_send("v").tokens == ()


def test_what_was_joined_goes_once_it_is_known_what_it_covers() -> None:
    sessions = Sessions()
    sessions.join("u", [_token({"a": 5}), _token({"b": 6})])
    sent = sessions.to_send("u")
    one = _token({"a": 5, "b": 6})
    sessions.heard(sent, one, frozenset({"a", "b"}))
    assert sessions.tokens("u") == (one,)
    sessions.wrote(["u"], _token({"a": 7, "b": 8}), frozenset({"a", "b"}), began=sessions.moment())
    assert sessions.tokens("u") == (_token({"a": 7, "b": 8}),)
    assert sessions.to_send(None).tokens == (_token({"a": 7, "b": 8}),)


def test_a_token_that_replaces_some_stands_for_nothing_else() -> None:
    """One of those that were sent may be older than what another session has of its shard."""
    session = Session()
    session.add(_token({"b": 9}), frozenset({"b"}), began=20, ended=21)
    session.add(_token({"a": 1}), frozenset({"a"}), began=30, ended=31)
    session.fold([_token({"a": 1}), _token({"b": 2})], _token({"a": 1, "b": 2}), frozenset({"a", "b"}))
    assert _positions(session.tokens()) == {"a": 1, "b": 9}


@pytest.mark.parametrize("count", [1, 5])
def test_the_same_token_again_is_one(count: int) -> None:
    sessions = Sessions()
    for _ in range(count):
        sessions.join("u", [_token({"a": 1})])
    assert sessions.tokens("u") == (_token({"a": 1}),)
