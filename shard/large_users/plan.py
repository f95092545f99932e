"""Who is to have an index of their own. Pure.

The largest get one, from a number of memories on, and a bounded number of users. Who has one keeps it until it is half
as large, or until there are as many others that are half as large again: so that two users of about the same size do
not take it from each other by turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_KEPT_SHARE = 0.5
_KEPT_WEIGHT = 1.5
# Nobody gets one in the middle of an import: what comes while it is made is added one by one, far more slowly.
_SETTLED = 0.9
# What was found out about an index is found out again when the user has grown or shrunk by so much.
_DRIFT = 1.5


@dataclass(frozen=True, slots=True)
class LargeUser:
    """A user with many memories. `key` and `user_hash` are two hashes of the name."""

    key: int
    user_hash: bytes
    slot: int | None
    """The one slot of the user's memories; None where they are in many."""
    rows: int
    """Memories with an embedding."""
    own: bool
    """The slot is this shard's to write: nobody is promoted for rows that are on their way."""
    user_id: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Existing:
    """An index that there is."""

    name: str
    key: int
    measured_rows: int | None
    """How many memories the user had when recall was measured; None: it has not been."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """From how many memories on, and for how many users."""

    rows: int
    most: int

    @property
    def kept_rows(self) -> int:
        """How many memories keep an index."""
        return max(1, int(self.rows * _KEPT_SHARE))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done: in this order, the largest first."""

    drop: tuple[Existing, ...]
    measure: tuple[LargeUser, ...]
    build: tuple[LargeUser, ...]


def decide(users: Sequence[LargeUser], existing: Sequence[Existing], bounds: Bounds, before: Mapping[int, int]) -> Plan:
    """What is to be done for `users`, who are all those with `bounds.kept_rows` memories or more; `before` are the rows
    of the same by `key` as of the last look.
    """
    there: Mapping[int, Existing] = {index.key: index for index in existing}

    def weight(user: LargeUser) -> float:
        return user.rows * (_KEPT_WEIGHT if user.key in there else 1.0)

    def deserves(user: LargeUser) -> bool:
        if user.key in there:
            return user.rows >= bounds.kept_rows
        has_settled = before.get(user.key, 0) >= user.rows * _SETTLED
        return user.own and user.rows >= bounds.rows and has_settled

    wanted = [user for user in users if deserves(user)]
    wanted = sorted(wanted, key=weight, reverse=True)[: bounds.most]
    chosen = {user.key for user in wanted}
    return Plan(
        drop=tuple(index for index in existing if index.key not in chosen),
        measure=tuple(
            user for user in wanted if user.key in there and has_drifted(there[user.key].measured_rows, user.rows)
        ),
        build=tuple(user for user in wanted if user.key not in there),
    )


def deserves_shared(rows: int, before: int, bounds: Bounds, *, there: bool) -> bool:
    """Whether all memories together, `rows` of them and `before` at the last look, are to have the shared index: by the
    same rules as one user's.
    """
    return rows >= bounds.kept_rows if there else rows >= bounds.rows and before >= rows * _SETTLED


def has_drifted(measured: int | None, rows: int) -> bool:
    """Whether recall is to be measured again, with `rows` memories where it was measured with so many."""
    return measured is None or not measured / _DRIFT <= rows <= measured * _DRIFT
