"""The sync set: who is lost, what to change to, when it is in force. And that no change loses what was acknowledged."""

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest

from common.sync_set import Progress, SyncSet, promotable, required, setting
from memshard.v1 import memory_pb2 as pb
from shard.durability import Durability
from shard.position import Position
from shard.sync_plan import Seen, Settling, Standby, View, Watch, target

B, C, D = "b", "c", "d"
NOBODY: frozenset[str] = frozenset()
FAR_BEHIND = 10**9
HERE = Position(timeline=1, lsn=100, waits=True, server="a")


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


def _view(flushed: Mapping[str, int], *, lsn: int = 100, counted: str = "", names: str = "") -> View:
    standbys = {name: Standby(True, at, name in counted) for name, at in flushed.items()}
    return View("a", names, lsn, standbys)


def _recorded(members: frozenset[str], following: frozenset[str] | None = None) -> SyncSet:
    return SyncSet("a", members, following)


def test_a_standby_that_flushes_nothing_while_there_is_something_to_flush_is_lost_after_a_while() -> None:
    watch = Watch(2.0, 0.5)
    for now in range(4):
        assert watch.look(_set(B), _view({B: 50}, lsn=100 + now), now / 2).lost == NOBODY
    assert watch.look(_set(B), _view({B: 50}, lsn=200), 2.0).lost == _set(B)
    assert watch.look(_set(B), _view({B: 51}, lsn=300), 3.0).lost == NOBODY


def test_one_that_is_away_is_lost_and_one_with_nothing_to_flush_is_not() -> None:
    watch = Watch(2.0, 0.5)
    for now in range(20):
        seen = watch.look(_set(B, C), _view({C: 100}, lsn=100), now / 2)
    assert seen == Seen(lost=_set(B), ready=_set(C))


def test_one_that_hangs_is_not_taken_back_for_being_connected_and_close() -> None:
    watch = Watch(2.0, 0.5)
    for now in range(20):
        seen = watch.look(NOBODY, _view({B: 50}, lsn=100 + now), now / 2)
        assert seen.ready == (_set(B) if now == 0 else NOBODY)
    assert seen.lost == _set(B)


def test_one_that_is_far_behind_or_catching_up_is_not_ready() -> None:
    assert Watch(2.0, 0.5).look(NOBODY, _view({B: 100 - FAR_BEHIND}), 0.0).ready == NOBODY
    catching_up = View("a", "", 100, {B: Standby(False, 100, False)})
    assert Watch(2.0, 0.5).look(NOBODY, catching_up, 0.0).ready == NOBODY


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A service that was frozen for a minute cannot say who flushed what meanwhile."""
    watch = Watch(2.0, 0.5)
    watch.look(_set(B), _view({B: 50}), 0.0)
    assert watch.look(_set(B), _view({B: 50}), 60.0).lost == NOBODY


def test_one_that_was_made_again_and_begins_further_back_is_not_lost() -> None:
    watch = Watch(2.0, 0.5)
    for now in range(10):
        seen = watch.look(_set(B), _view({B: 90}, lsn=100 + now), now / 2)
    assert seen.lost == _set(B)
    for now in range(10, 20):
        assert watch.look(_set(B), _view({B: now}, lsn=100 + now), now / 2).lost == NOBODY


@pytest.mark.parametrize(
    ("members", "following", "ready", "lost", "may_degrade", "expected"),
    [
        (NOBODY, None, NOBODY, NOBODY, True, NOBODY),
        (NOBODY, None, _set(B), NOBODY, True, _set(B)),
        (_set(B), None, _set(B, C), NOBODY, True, _set(B, C)),
        (_set(B, C), None, _set(B), _set(C), True, _set(B)),
        (_set(B, C), None, _set(B), NOBODY, True, _set(B, C)),  # Away, and not for long enough.
        (_set(B), None, NOBODY, _set(B), True, NOBODY),
        (_set(B), None, NOBODY, _set(B), False, _set(B)),  # Refuse: wait for it.
        (_set(B, C), None, NOBODY, _set(B, C), False, _set(B, C)),
        (_set(B), None, _set(C), _set(B), False, _set(C)),  # Another is there instead.
        # A change under way is finished before the next one.
        (_set(B), _set(B, C), _set(B, C, D), NOBODY, True, _set(B, C)),
        (_set(B), _set(B, C), _set(B), _set(C), True, _set(B, C)),  # A quorum of it is there.
        (_set(B), _set(C), _set(B), _set(C), True, NOBODY),
        (_set(B), _set(C), _set(B), _set(C), False, _set(C)),
        (_set(B), NOBODY, _set(B), NOBODY, True, NOBODY),
    ],
)
def test_the_set_that_should_be(
    members: frozenset[str],
    following: frozenset[str] | None,
    ready: frozenset[str],
    lost: frozenset[str],
    may_degrade: bool,
    expected: frozenset[str],
) -> None:
    assert target(_recorded(members, following), Seen(lost, ready), may_degrade=may_degrade) == expected


def test_a_set_is_in_force_once_it_counts_has_settled_and_its_quorum_has_all_from_before() -> None:
    names = setting(_set(B))
    settling = Settling(_set(B), changed_at=10.0)
    assert not settling.is_in_force(_view({B: 100}, counted="b", names=""), 12.0)  # Not the setting yet.
    assert not settling.is_in_force(_view({B: 100}, counted="", names=names), 12.0)  # Not counted yet.
    assert not settling.is_in_force(_view({B: 100}, counted="b", names=names), 10.5)  # Not long enough.
    assert not settling.is_in_force(_view({B: 90}, lsn=100, counted="b", names=names), 12.0)
    assert not settling.is_in_force(_view({B: 99}, lsn=200, counted="b", names=names), 12.2)
    assert settling.is_in_force(_view({B: 100}, lsn=300, counted="b", names=names), 12.4)


def test_one_that_is_counted_and_should_not_be_keeps_a_set_from_being_in_force() -> None:
    settling = Settling(_set(B), changed_at=None)
    assert not settling.is_in_force(_view({B: 100, C: 100}, counted="bc", names=setting(_set(B))), 0.0)
    assert settling.is_in_force(_view({B: 100, C: 100}, counted="b", names=setting(_set(B))), 0.0)


def test_nobody_is_in_force_as_soon_as_it_is_the_setting() -> None:
    assert not Settling(NOBODY, 0.0).is_in_force(_view({}, names=setting(_set(B))), 0.0)
    assert Settling(NOBODY, 0.0).is_in_force(_view({}, names=""), 0.0)


def test_a_receipt_says_quorum_only_if_the_set_was_in_force_from_before_the_commit_until_after_it() -> None:
    def receipt(durability: Durability, begun: int, here: Position = HERE) -> str:
        return pb.Durability.Name(durability.of_commit(begun, here)).removeprefix("DURABILITY_")

    durability = Durability()
    begun_before = durability.begin()
    assert receipt(durability, begun_before) == "LOCAL"
    durability.set_quorum(_set(B), "a", 1)
    assert receipt(durability, begun_before) == "LOCAL"
    begun = durability.begin()
    assert receipt(durability, begun) == "QUORUM"
    # Emptied by hand, and not noticed yet.
    assert receipt(durability, begun, replace(HERE, waits=False)) == "LOCAL"
    # A successor took the commit, or another that thinks so, and nobody has noticed.
    assert receipt(durability, begun, replace(HERE, timeline=2)) == "LOCAL"
    assert receipt(durability, begun, replace(HERE, server="b")) == "LOCAL"
    durability.set_quorum(_set(B, C), "a", 1)  # Joint: whoever promotes has to satisfy both.
    assert receipt(durability, begun) == "QUORUM"
    durability.set_local()
    assert receipt(durability, begun) == "LOCAL"
    durability.set_quorum(_set(B), "a", 1)
    assert receipt(durability, begun) == "LOCAL"  # There was a time between in which nobody waited.
    begun = durability.begin()
    assert receipt(durability, begun) == "QUORUM"
    durability.set_quorum(_set(B), "b", 2)
    assert receipt(durability, begun, replace(HERE, server="b", timeline=2)) == "LOCAL"


class _Cluster:
    """A primary, its standbys, and a keeper that may be stopped between any two of its steps.

    Commits are numbers. A standby has all up to some number on disk. A commit is acknowledged when the setting's quorum
    has it; `promised` is the newest that was acknowledged as QUORUM.
    """

    def __init__(self) -> None:
        self.recorded = SyncSet("a", NOBODY)
        self.names: frozenset[str] = NOBODY
        self.flushed = dict.fromkeys((B, C, D), 0)
        self.connected = {B, C, D}
        self.committed = 0
        self.promised = 0
        self.durability = Durability()
        self.settling: Settling | None = None
        self.now = 0.0

    def view(self) -> View:
        standbys = {name: Standby(True, self.flushed[name], name in self.names) for name in self.connected}
        return View("a", setting(self.names), self.committed, standbys)

    def commit(self) -> None:
        self.committed += 1

    def replicate(self, name: str) -> None:
        if name in self.connected:
            self.flushed[name] = self.committed

    def acknowledge(self) -> None:
        """Acknowledges whatever the setting's quorum has."""
        has = sorted((self.flushed[name] for name in self.names), reverse=True)
        if self.names and self.durability.members:
            self.promised = max(self.promised, has[required(len(self.names)) - 1])

    def step(self, lost: frozenset[str]) -> None:
        """One step of the keeper, as shard/sync_keeper.py takes them."""
        self.now += 2.0
        view, recorded = self.view(), self.recorded
        wanted = target(recorded, Seen(lost, frozenset(self.connected)), may_degrade=True)
        if wanted != (recorded.members if recorded.following is None else recorded.following):
            self.recorded = SyncSet("a", recorded.members, wanted)
            return
        if not wanted:
            self.durability.set_local()
        if self.names != wanted:
            self.names = wanted
            self.settling = Settling(wanted, self.now)
            return
        if self.settling is None or self.settling.members != wanted:
            self.settling = Settling(wanted, self.now)
        if self.settling.is_in_force(view, self.now):
            if recorded.following is not None:
                self.recorded = SyncSet("a", wanted)
            if wanted:
                self.durability.set_quorum(wanted, "a", 1)

    def is_safe(self) -> bool:
        """Whether, whoever is reached, the one that may be promoted has all that was promised."""
        everybody = (B, C, D)
        for mask in range(1, 8):
            reached = {name: Progress(1, self.flushed[name]) for i, name in enumerate(everybody) if mask >> i & 1}
            chosen = promotable(self.recorded, reached)
            if chosen is not None and self.flushed[chosen] < self.promised:
                return False
        return True


def test_nothing_promised_is_lost_whenever_a_standby_may_be_promoted() -> None:
    promised = 0
    for seed in range(1000):
        random = Random(seed)
        cluster = _Cluster()
        for _ in range(60):
            what = random.choices(["step", "write", "leave", "return"], [8, 4, 1, 2])[0]
            if what == "step":
                # Who is away may be lost by now, or not yet.
                away = {B, C, D} - cluster.connected
                cluster.step(frozenset(name for name in away if random.random() < 0.5))
            elif what == "write":
                cluster.commit()
                for name in (B, C, D):
                    if random.random() < 0.5:
                        cluster.replicate(name)
                cluster.acknowledge()
            elif what == "leave":
                cluster.connected.discard(random.choice([B, C, D]))
            else:
                cluster.connected.add(random.choice([B, C, D]))
            assert cluster.is_safe(), f"seed {seed}"
        promised += cluster.promised > 0
    assert promised > 300, "hardly anything was promised"
