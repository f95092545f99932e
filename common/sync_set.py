"""The sync set: which standbys a shard's commits wait for, and who of them may be promoted. Pure.

A commit is acknowledged as QUORUM when `required(n)` of the set's n members have it on disk. Any group of
`n - required(n) + 1` members then holds at least one that has it, so the most advanced of such a group may be promoted
and nothing acknowledged is lost.

The set changes in two steps, both of them compare-and-set in the catalog: first `following` is recorded, then the
primary's setting is changed, then `following` takes the place of `members`. In between commits may have waited for
either set, so whoever promotes has to reach enough members of both (joint consensus: Ongaro & Ousterhout, "In Search of
an Understandable Consensus Algorithm", 2014, section 6).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SyncSet:
    """What the catalog records of one shard. Servers are named by the `application_name` that they stream with."""

    primary: str
    members: frozenset[str]
    following: frozenset[str] | None = None
    version: int = 1


@dataclass(frozen=True, slots=True, order=True)
class Progress:
    """How far a standby has the log on disk. Ordered: a later timeline has all that an earlier one acknowledged."""

    timeline: int
    lsn: int


def required(members: int) -> int:
    """How many standbys of `members` a commit waits for, so that it is on a majority of all servers."""
    return (members + 1) // 2


def setting(members: Collection[str]) -> str:
    """PostgreSQL's synchronous_standby_names for a set; empty when commits wait for nobody."""
    if not members:
        return ""
    names = ", ".join('"' + name.replace('"', '""') + '"' for name in sorted(members))
    return f"ANY {required(len(members))} ({names})"


def promotable(sync_set: SyncSet, reached: Mapping[str, Progress]) -> str | None:
    """The standby to promote, given how far those are that were reached; None when too few were to be sure.

    Whoever promotes must have made sure that the primary acknowledges nothing any more.
    """
    sets = [sync_set.members] if sync_set.following is None else [sync_set.members, sync_set.following]
    for members in sets:
        if len(reached.keys() & members) < len(members) - required(len(members)) + 1:
            return None
    candidates = frozenset().union(*sets) & reached.keys()
    # The name decides between equals, so that a repeated decision is the same one.
    return max(sorted(candidates), key=lambda name: reached[name])
