"""What a client's reads must see: the consistency tokens of its writes, per user, and no more of them than are needed.

Tokens are opaque here. Of each, two things are known: when its write began and ended, and from what came with it, which
shards it covers. A write that began after another had ended, and that covers its shards, has a later place in their
logs, and its token stands for both. Writes that ran side by side keep a token each, since their receipts may come in
any order. So there are about as many tokens as shards and concurrent writes; and a read that sent several learns of one
that stands for them all. Should there be more than a read may carry, that user's reads are strong until a later write
stands for those that had to go: slower, and never stale.

| reads of | send |
|---|---|
| a user who has a session here | its tokens |
| another user | those of the sessions that had to make room: the user's may be among them |
| all users, or by id alone | those of all writes of the client |
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

MAX_TOKENS: Final = 64
"""As many as a read may carry."""

MAX_USERS: Final = 10_000
"""Sessions kept; one with a single token takes about 1 KB."""

LOST: Final = b""
"""In place of tokens that had to go. Whoever has it among theirs must read from the primary; no service takes it."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A token; the shards that it covers, None when that is not known; when what it stands for began and ended."""

    token: bytes
    covers: frozenset[str] | None
    began: int
    ended: int

    def stands_for(self, other: _Kept) -> bool:
        """Whether whoever has seen this has seen the other."""
        return (
            self.covers is not None
            and other.covers is not None
            and other.covers <= self.covers
            and other.ended < self.began
        )

    def joined(self, other: _Kept, token: bytes) -> _Kept:
        """One for both: it stands for no more than either, and is stood for by what stands for both."""
        covers = None if self.covers is None or other.covers is None else self.covers | other.covers
        return _Kept(token, covers, min(self.began, other.began), max(self.ended, other.ended))


class Session:
    """The tokens that stand for a set of writes. Moments are numbers that grow."""

    def __init__(self) -> None:
        self._kept: dict[bytes, _Kept] = {}

    def add(self, token: bytes, covers: frozenset[str] | None, *, began: int, ended: int) -> None:
        """Takes up a token, and drops those that it stands for."""
        self._keep(_Kept(token, covers, began, ended))

    def fold(self, sent: Sequence[bytes], token: bytes, covers: frozenset[str] | None) -> None:
        """Puts one token, which stands for all that were sent, into their place."""
        replaced = [self._kept.pop(old) for old in sent if old in self._kept]
        if not replaced:
            return
        one = replaced[0]
        for kept in replaced:
            one = one.joined(kept, token)
        # Of those that were not here it is not known when they began, so that it may be older than something that is.
        began = one.began if len(replaced) == len(sent) else 0
        self._keep(_Kept(token, one.covers if covers is None else covers, began, one.ended))

    def absorb(self, other: Session) -> None:
        """Takes up all that another has."""
        for kept in other._kept.values():
            self._keep(kept)

    def tokens(self) -> tuple[bytes, ...]:
        """All of them, oldest first; LOST among them when some had to go."""
        return tuple(self._kept)

    def _keep(self, new: _Kept) -> None:
        known = self._kept.get(new.token)
        if known is not None:
            if new.token == LOST:
                new = known.joined(new, LOST)
            elif new.covers is None or known.covers is not None:
                return  # The same again.
        elif any(kept.stands_for(new) for kept in self._kept.values()):
            return
        for old in [kept for kept in self._kept.values() if new.stands_for(kept)]:
            del self._kept[old.token]
        self._kept[new.token] = new
        while len(self._kept) > MAX_TOKENS:
            oldest = next(kept for kept in self._kept.values() if kept.token != LOST)
            del self._kept[oldest.token]
            self._kept[LOST] = oldest.joined(self._kept.pop(LOST, oldest), LOST)


@dataclass(frozen=True, slots=True)
class Sent:
    """The tokens that a read carries. None: it has to be strong."""

    user_id: str | None
    tokens: tuple[bytes, ...] | None


class Sessions:
    """The sessions of one client. Safe to share between threads."""

    def __init__(self, max_users: int = MAX_USERS) -> None:
        self._max_users = max_users
        self._lock = threading.Lock()
        self._moments = itertools.count(1)
        self._by_user: OrderedDict[str, Session] = OrderedDict()
        self._everybody = Session()
        self._dropped = Session()

    def moment(self) -> int:
        """Now: greater than all moments before."""
        return next(self._moments)

    def wrote(self, users: Iterable[str], token: bytes, covers: frozenset[str] | None, *, began: int) -> None:
        """A write of these users' memories, begun at this moment, has been acknowledged."""
        if not token:
            return
        with self._lock:
            ended = self.moment()
            self._everybody.add(token, covers, began=began, ended=ended)
            for user_id in dict.fromkeys(users):
                self._session(user_id).add(token, covers, began=began, ended=ended)

    def join(self, user_id: str, tokens: Iterable[bytes]) -> None:
        """What another client has written is to be seen here too."""
        with self._lock:
            now = self.moment()
            for token in tokens:
                for session in (self._session(user_id), self._everybody):
                    # Nothing here is known to be older than what happened elsewhere.
                    session.add(token, None, began=0, ended=now)

    def tokens(self, user_id: str) -> tuple[bytes, ...]:
        """What another client needs to see this user's writes; LOST among them when it has to read from the primary."""
        with self._lock:
            return self._reading(user_id).tokens()

    def to_send(self, user_id: str | None) -> Sent:
        """What a read of this user's memories, or of everybody's, must see."""
        with self._lock:
            tokens = self._reading(user_id).tokens()
        return Sent(user_id, None if LOST in tokens else tokens)

    def heard(self, sent: Sent, token: bytes | None, covers: frozenset[str] | None) -> None:
        """What came with the answer: one token for all that were sent, and the shards that these cover."""
        if not sent.tokens or (token is None and (len(sent.tokens) > 1 or covers is None)):
            return
        with self._lock:
            for session in (self._reading(sent.user_id), self._everybody):
                session.fold(sent.tokens, token or sent.tokens[0], covers)

    def _session(self, user_id: str) -> Session:
        session = self._by_user.get(user_id)
        if session is None:
            session = self._by_user[user_id] = Session()
            # The user may have had one before, which had to make room.
            session.absorb(self._dropped)
        self._by_user.move_to_end(user_id)
        if len(self._by_user) > self._max_users:
            _, oldest = self._by_user.popitem(last=False)
            self._dropped.absorb(oldest)
        return session

    def _reading(self, user_id: str | None) -> Session:
        if user_id is None:
            return self._everybody
        if user_id not in self._by_user:
            return self._dropped
        self._by_user.move_to_end(user_id)
        return self._by_user[user_id]
