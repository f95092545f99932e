"""How fresh reads must be: levels, bounds, and the tokens that go with them. Both clients share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from memshard import _values
from memshard._sessions import Sent, Sessions
from memshard._wire import Trailers
from memshard.errors import invalid
from memshard.types import ReadLevel
from memshard.v1 import memory_pb2 as pb

# The shards that the tokens of a receipt, or of a read, cover: names with commas.
_COVERS_TRAILER: Final = "memshard-covers"
# One token that stands for all that a read carried.
_SESSION_TRAILER: Final = "memshard-session-bin"

_MAX_STALENESS_S: Final = 366 * 86_400
"""What is longer is a mistake. The service takes it for no bound at all."""


class Reading:
    """What the reads of one client ask for, and what its writes add to that. Safe to share between threads."""

    def __init__(self, read: ReadLevel, max_staleness_s: float | None) -> None:
        _check(read, max_staleness_s)
        self._read = read
        self._max_staleness_s = max_staleness_s
        self._sessions = Sessions()

    def options(
        self, user_id: str | None, read: ReadLevel | None, max_staleness_s: float | None
    ) -> tuple[pb.ReadOptions, Sent]:
        """The options of a read of this user's memories, None: of everybody's, and what it carries."""
        level = self._read if read is None else read
        if max_staleness_s is None and level == self._read:
            max_staleness_s = self._max_staleness_s
        _check(level, max_staleness_s)
        sent = self._sessions.to_send(user_id) if level == ReadLevel.SESSION else Sent(user_id, ())
        return _options(level, max_staleness_s, sent.tokens), sent

    def heard(self, sent: Sent, trailers: Trailers) -> None:
        """A read has been answered."""
        self._sessions.heard(sent, _session_token(trailers), _covers(trailers))

    def moment(self) -> int:
        """When a write begins."""
        return self._sessions.moment()

    def wrote(self, users: Iterable[str], receipt: pb.WriteReceipt, trailers: Trailers, began: int) -> None:
        """A write of these users' memories has been acknowledged."""
        self._sessions.wrote(users, receipt.consistency_token, _covers(trailers), began=began)

    def tokens(self, user_id: str) -> tuple[bytes, ...]:
        """What another client needs to see this user's writes."""
        return self._sessions.tokens(_values.text("user_id", user_id))

    def join(self, user_id: str, tokens: Iterable[bytes]) -> None:
        """What another client has written of a user is to be seen here too."""
        given = (tokens,) if isinstance(tokens, bytes) else tuple(tokens)
        for token in given:
            if not isinstance(token, bytes):
                raise invalid("tokens", f"must be bytes, not {type(token).__name__}")
        self._sessions.join(_values.text("user_id", user_id), given)


def _check(read: ReadLevel, max_staleness_s: float | None) -> None:
    """Raises InvalidArgument for a level that is none, or a bound that does not go with it."""
    if not isinstance(read, int) or ReadLevel(read) is ReadLevel.UNSPECIFIED:
        raise invalid("read", f"is no read level: {read!r}")
    if max_staleness_s is None:
        if read == ReadLevel.BOUNDED_STALENESS:
            raise invalid("max_staleness_s", "is required with BOUNDED_STALENESS")
        return
    if read in (ReadLevel.STRONG, ReadLevel.EVENTUAL):
        raise invalid("max_staleness_s", f"means nothing with {ReadLevel(read).name}")
    if not 0 < _values.number("max_staleness_s", max_staleness_s) <= _MAX_STALENESS_S:
        raise invalid("max_staleness_s", f"must be more than 0 and at most {_MAX_STALENESS_S}, not {max_staleness_s!r}")


def _options(read: ReadLevel, max_staleness_s: float | None, tokens: Sequence[bytes] | None) -> pb.ReadOptions:
    """`tokens`: what the read must see; None: to see that, it must be strong."""
    if tokens is None:
        return pb.ReadOptions(level=pb.READ_LEVEL_STRONG)
    options = pb.ReadOptions(level=pb.ReadLevel.ValueType(read), consistency_tokens=tokens)
    if max_staleness_s is not None:
        options.max_staleness.FromNanoseconds(max(1, round(max_staleness_s * 1e9)))
    return options


def _covers(trailers: Trailers) -> frozenset[str] | None:
    """The shards that the tokens of an answer cover; None when it does not say."""
    for key, value in trailers or ():
        if key == _COVERS_TRAILER:
            return frozenset(str(value).split(","))
    return None


def _session_token(trailers: Trailers) -> bytes | None:
    """The one token that stands for all that a read carried; None when there is none."""
    for key, value in trailers or ():
        if key == _SESSION_TRAILER and isinstance(value, bytes):
            return value
    return None
