"""What a read says of its freshness: never more than it has, whatever commits, waits and is seen in whichever order."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from shard.log_seen import LogSeen


@dataclass
class Primary:
    """A primary's log as PostgreSQL keeps it: a commit is in the log first and visible later, when its standbys have it
    for instance; its writer then reads how far the log is, which is his token."""

    flushed: int = 100
    seen: LogSeen = field(default_factory=LogSeen)
    waiting: list[int] = field(default_factory=list)
    visible: set[int] = field(default_factory=set)
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    """(token, commit) of each write."""
    reads: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    """(position said, commits seen) of each read."""
    begun: list[int] = field(default_factory=list)
    """Positions said of reads whose snapshot is still to be taken."""

    def commit(self) -> None:
        self.flushed += 8
        self.waiting.append(self.flushed)

    def wait_ends(self) -> None:
        if self.waiting:
            self.visible.add(self.waiting.pop(0))

    def newest_wait_ends(self) -> None:
        if self.waiting:
            self.visible.add(self.waiting.pop())

    def acknowledge(self) -> None:
        known = {commit for _, commit in self.acknowledged}
        self.acknowledged += [(self.flushed, commit) for commit in self.visible - known]
        self.seen.observe(1, self.flushed)

    def beat(self) -> None:
        self.seen.observe(1, self.flushed)

    def read_begins(self) -> None:
        stamp = self.seen.stamp(1)
        self.begun += [] if stamp is None else [stamp.lsn]

    def snapshot(self) -> None:
        if self.begun:
            self.reads.append((self.begun.pop(0), frozenset(self.visible)))


_steps = ("commit", "wait_ends", "newest_wait_ends", "acknowledge", "beat", "read_begins", "snapshot")


@given(st.lists(st.sampled_from(_steps), max_size=60))
def test_a_read_has_all_that_tokens_up_to_its_position_speak_of(steps: list[str]) -> None:
    primary = Primary()
    for step in [*steps, "acknowledge", "snapshot", "wait_ends", "acknowledge"]:
        getattr(primary, step)()
    for said, found in primary.reads:
        for token, commit in primary.acknowledged:
            assert token > said or commit in found


def test_a_commit_that_waits_for_its_standbys_is_not_vouched_for() -> None:
    """Its place in the log is known already, and a token of it may be no later than that."""
    primary = Primary()
    for step in ("commit", "beat", "read_begins", "snapshot", "wait_ends", "acknowledge"):
        getattr(primary, step)()
    ((said, found),), ((token, commit),) = primary.reads, primary.acknowledged
    assert commit not in found
    assert token > said


def test_nothing_is_said_of_another_timeline() -> None:
    seen = LogSeen()
    assert seen.stamp(0) is None
    assert seen.stamp(1) is None
    seen.observe(2, 50)
    seen.observe(1, 900)
    assert seen.stamp(1) is None
    stamp = seen.stamp(2)
    assert stamp is not None
    assert (stamp.timeline, stamp.lsn, stamp.age_ms) == (2, 49, 0)
