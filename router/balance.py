"""Which servers of a shard a read is sent to, and in which order. Pure.

A replica's answer to "are you fresh enough?" is the only one that counts, and it is the replica that gives it, with the
read. What is decided here is whom to ask first: a wrong guess costs time, never an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from router.consistency import Position, Wanted

PRIMARY = "(primary)"
"""Stands for the primary among the ids of replicas, none of which has parentheses."""


class Outlook(IntEnum):
    """What may be expected of a replica, best first."""

    FRESH = 0  # By what is known, it is fresh enough.
    HOPEFUL = 1  # It keeps up, so that it may be there by now, or soon.
    BEHIND = 2  # It has said that it is not, and nothing has been heard since that says otherwise.


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one replica."""

    position: Position
    """It has at least this."""
    lag_ms: int
    """How old what it has was when it last said so."""
    refused: Position | None = None
    """It was asked for this or later, and did not have it in time."""
    refused_staleness_ms: int = 0
    """It was asked for at most this much staleness, and was behind more; 0: it was not."""
    suspect: bool = False
    """It has left a call unanswered, and not been heard of since."""

    def outlook(self, wanted: Wanted) -> Outlook:
        """What may be expected of it."""
        staleness_ms = wanted.max_staleness_ms
        if staleness_ms and (self.lag_ms > staleness_ms or self.refused_staleness_ms >= staleness_ms):
            return Outlook.BEHIND
        if wanted.position is None:
            return Outlook.FRESH
        if self.refused is not None and wanted.position >= self.refused:
            return Outlook.BEHIND
        return Outlook.FRESH if self.position >= wanted.position else Outlook.HOPEFUL

    def looked(self, position: Position, lag_ms: int) -> "Standing":
        """After it has said where it is."""
        refused = self.refused if self.refused is not None and position < self.refused else None
        return Standing(position, lag_ms, refused)

    def proved(self, wanted: Wanted) -> "Standing":
        """After it has answered a read that asked for this."""
        if wanted.position is None or wanted.position <= self.position:
            return self
        refused = self.refused if self.refused is not None and wanted.position < self.refused else None
        return replace(self, position=wanted.position, refused=refused)

    def refusing(self, wanted: Wanted) -> "Standing":
        """After it has said that it does not have this."""
        refused, staleness_ms = self.refused, self.refused_staleness_ms
        if wanted.position is not None:
            refused = wanted.position if refused is None else min(refused, wanted.position)
        return replace(self, refused=refused, refused_staleness_ms=max(staleness_ms, wanted.max_staleness_ms))

    def suspected(self) -> "Standing":
        """After it has left a call unanswered."""
        return replace(self, suspect=True)


@dataclass(frozen=True, slots=True)
class Order:
    """Names of servers, in the order in which a read is sent to them."""

    first: tuple[str, ...]
    """Each for a short time. PRIMARY is among them only where it takes its share."""
    last: tuple[str, ...]
    """Replicas that are no use while the primary answers: asked, and waited for, when it does not."""


def order(
    wanted: Wanted, replicas: Mapping[str, Standing], outstanding: Mapping[str, int], *, turn: int, share: bool
) -> Order:
    """The order for one read, of which the primary comes after `first` and before `last`.

    Args:
        replicas: what is known of those that serve, by name.
        outstanding: how many calls each server has not answered yet, by name.
        turn: another number for each read, which decides between equals.
        share: whether the primary takes reads like a replica.
    """
    names = sorted(replicas)
    turns = {name: (number - turn) % len(names) for number, name in enumerate(names)}
    outlooks = {name: replicas[name].outlook(wanted) for name in names}

    def place(name: str) -> tuple[int, int, int]:
        if name == PRIMARY:  # Last among equals, as it has the writes to do.
            return Outlook.FRESH, outstanding.get(name, 0), len(names)
        return outlooks[name], outstanding.get(name, 0), turns[name]

    useful = [name for name in names if outlooks[name] is not Outlook.BEHIND and not replicas[name].suspect]
    rest = [name for name in names if name not in useful]
    return Order(
        first=tuple(sorted([*useful, PRIMARY] if share and useful else useful, key=place)),
        # Whoever is furthest is the likeliest to get there.
        last=tuple(sorted((*useful, *rest), key=lambda name: replicas[name].position, reverse=True)),
    )
