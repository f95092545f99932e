"""What a router makes of what it sees of its shards, and where the levels take effect."""

from contextlib import ExitStack, suppress

import pytest

from common.breaker import State
from common.breaker_log import logged
from common.breaker_settings import CACHE, SHARD
from common.errors import DeadlineExceeded, MemshardError, NotFound, ReadOnly, ResourceExhausted, Unavailable
from common.level import WHAT_EACH_LEVEL_DOES, Level
from common.limiter import Priority
from common.machine import Busy
from common.topology import CLUSTER
from router.consistency import STRONG
from router.guard import Guards, Kind
from router.levels import Levels
from tests.support.clock import Clock
from tests.unit.router.scripted import router, servers

_SHARDS = ("shard-0", "shard-1", "shard-2")


class Watched:
    """Levels of three shards on a clock of the test's own, looked at once a second."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.guards = Guards(self.clock)
        self.levels = Levels(self.guards, self.clock)
        for shard_id in _SHARDS:
            self.guards.of(shard_id)

    def call(
        self,
        shard_id: str,
        error: Exception | None = None,
        *,
        kind: Kind = Kind.RETRIEVE,
        took_s: float = 0.01,
        times: int = 30,
    ) -> None:
        """Makes calls that end so: all at once, or those that fail one after the other."""
        guard = self.guards.of(shard_id)
        if error is None:
            with ExitStack() as stack:
                for _ in range(times):
                    with suppress(MemshardError):
                        stack.enter_context(guard.passing(kind, kind.value, Priority.INTERACTIVE))
                self.clock.pass_(took_s)
            return
        for _ in range(times):
            with suppress(MemshardError), guard.passing(kind, kind.value, Priority.INTERACTIVE):
                self.clock.pass_(took_s)
                raise error

    def watch(
        self, seconds: int, *failing: str, error: Exception | None = None, took_s: float = 0.01, cpu: float = 0.0
    ) -> None:
        """Lets calls go on for a while, those to the shards named with an error or slowly."""
        for _ in range(seconds):
            over = self.clock() + 1
            for shard_id in _SHARDS:
                bad = shard_id in failing
                self.call(shard_id, error if bad else None, took_s=took_s if bad else 0.001)
            self.clock.now = max(self.clock.now, over)
            self.levels.look(cpu=cpu)


def test_one_shards_failures_set_its_level_and_never_the_clusters() -> None:
    watched = Watched()
    watched.watch(15, "shard-1", error=Unavailable("gone"))
    assert watched.levels.of(["shard-1"]) is Level.REDUCED
    assert watched.levels.of(["shard-0"]) is watched.levels.of() is Level.NORMAL
    assert watched.levels.of(["shard-0", "shard-1"]) is Level.REDUCED


def test_what_most_shards_have_the_cluster_has() -> None:
    watched = Watched()
    watched.watch(15, "shard-0", "shard-1", error=Unavailable("gone"))
    assert watched.levels.of() is Level.REDUCED
    watched.watch(60)
    assert watched.levels.of(_SHARDS) is Level.NORMAL


@pytest.mark.parametrize("error", [NotFound("no such memory"), ResourceExhausted("too much", reason="OVERLOADED")])
def test_answers_that_callers_deserve_are_no_errors(error: Exception) -> None:
    watched = Watched()
    watched.watch(15, *_SHARDS, error=error)
    assert watched.levels.of(_SHARDS) is Level.NORMAL


def test_callers_in_a_hurry_degrade_nobody() -> None:
    watched = Watched()
    watched.watch(15, "shard-0", error=DeadlineExceeded("in a hurry"), took_s=0.01)
    assert watched.levels.of(_SHARDS) is Level.NORMAL


def test_a_breaker_that_nobody_tries_any_more_sets_no_level() -> None:
    watched = Watched()
    guard = watched.guards.of("shard-0", "replica-0")
    for _ in range(SHARD.consecutive_failures):
        with suppress(Unavailable), guard.passing(Kind.SEARCH, "Search", Priority.INTERACTIVE):
            raise Unavailable("gone")
    guard.heard()
    watched.watch(60)
    assert guard.breakers[Kind.SEARCH].state is State.HALF_OPEN
    assert watched.levels.of(_SHARDS) is Level.NORMAL


def test_a_slow_shard_is_reduced_and_its_limit_with_it() -> None:
    watched = Watched()
    watched.watch(40, "shard-2", took_s=0.3)
    assert watched.levels.of(["shard-2"]) is Level.REDUCED
    patient, hurried = (watched.guards.of(shard_id).limiter for shard_id in ("shard-0", "shard-2"))
    assert hurried.patience < patient.patience == 1.0
    assert hurried.batch_share < patient.batch_share == patient.settings.batch_share


def test_one_moment_is_no_level() -> None:
    watched = Watched()
    watched.watch(15)
    watched.call("shard-1", took_s=0.6, times=10)
    for _ in range(10):
        watched.watch(1)
        assert watched.levels.of(_SHARDS) is Level.NORMAL
    for _ in range(10):
        # Again and again is another thing.
        watched.call("shard-1", took_s=0.6, times=10)
        watched.watch(1)
    assert watched.levels.of(["shard-1"]) is Level.ESSENTIAL


def test_a_replica_that_is_asked_little_does_not_speak_for_its_shard() -> None:
    watched = Watched()
    replica = watched.guards.of("shard-0", "replica-0")
    for _ in range(20):
        with replica.passing(Kind.SEARCH, "Search", Priority.INTERACTIVE):
            watched.clock.pass_(0.6)
        watched.watch(1)
    assert watched.levels.of(_SHARDS) is Level.NORMAL


def test_slow_searches_over_all_users_degrade_nobody() -> None:
    watched = Watched()
    for _ in range(30):
        for shard_id in _SHARDS:
            for _ in range(2):
                with watched.guards.of(shard_id).passing(Kind.SEARCH, "SearchAll", Priority.INTERACTIVE, wide=True):
                    watched.clock.pass_(0.6)
        watched.watch(1)
    assert watched.levels.of(_SHARDS) is Level.NORMAL


def test_what_one_shard_refuses_is_not_the_clusters_even_on_a_busy_machine() -> None:
    watched = Watched()
    for _ in range(30):
        watched.guards.of("shard-0").lately.shed.add(20)
        watched.watch(1, cpu=1.0)
    assert watched.levels.of() is Level.NORMAL


def test_what_the_router_refuses_by_itself_is_the_clusters_on_a_busy_machine() -> None:
    watched = Watched()
    for _ in range(30):
        watched.levels.shed.add(20)
        watched.watch(1, cpu=1.0)
    assert watched.levels.of() is Level.REDUCED


def test_degradation_leaves_batches_less_room() -> None:
    limiter = Guards(Clock()).of("shard-0").limiter
    rooms = []
    for level in (Level.NORMAL, Level.REDUCED, Level.ESSENTIAL):
        limiter.batch_share = limiter.settings.batch_share * WHAT_EACH_LEVEL_DOES[level].batch_factor
        places = []
        while limiter.has_room(Priority.BATCH):
            places.append(limiter.admit("", Priority.BATCH))
        rooms.append(len(places))
        for place in places:
            place.ignore()
    assert rooms == [45, 23, 12]


def test_a_busy_machine_that_keeps_up_changes_nothing() -> None:
    watched = Watched()
    for _ in range(60):
        watched.call("shard-0", times=30)
        watched.levels.look(cpu=1.0, memory=0.99)
    assert watched.levels.of() is Level.NORMAL


def test_helpers_that_are_away_degrade_nobody() -> None:
    """There is nothing of theirs to relieve: all would have less room and less exact searches, for nothing."""
    watched = Watched()
    for name in ("Redis", "the catalog", "the embedder"):
        breaker = logged(name, CACHE, clock=watched.clock)
        watched.levels.dependencies.append(breaker)
        for _ in range(CACHE.consecutive_failures):
            breaker.admit().failure()
        watched.watch(10)
        assert watched.levels.of(_SHARDS) is Level.NORMAL
        assert watched.levels.open_breakers(CLUSTER) == 1.0
        assert watched.levels.open_breakers("shard-0") == 0.0


def test_what_an_operator_sets_counts_at_once_and_until_it_is_taken_back() -> None:
    watched = Watched()
    watched.levels.override({"shard-1": Level.READONLY})
    assert watched.levels.of(["shard-1"]) is Level.READONLY
    assert not watched.levels.effects("shard-1").allow_writes
    assert watched.levels.effects("shard-0").allow_writes
    watched.levels.override({CLUSTER: Level.MAINTENANCE})
    assert watched.levels.of(["shard-1"]) is Level.MAINTENANCE
    assert not watched.levels.effects().serving
    watched.levels.override({})
    assert watched.levels.of(_SHARDS) is Level.NORMAL


async def test_a_shard_that_is_set_to_maintenance_takes_no_writes_and_is_read_and_the_router_serves() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        reader.shards.levels.override({"shard-0": Level.MAINTENANCE})
        with pytest.raises(ReadOnly):
            await reader.store()
        assert await reader.get(STRONG) == "primary"
        assert reader.shards.levels.effects().serving


def test_a_shard_that_stores_nothing_and_is_read_becomes_read_only_after_half_a_minute() -> None:
    watched = Watched()
    for second in range(40):
        watched.clock.pass_(1)
        watched.call("shard-0", times=3, took_s=0.001)
        watched.call("shard-0", Unavailable("disk full"), kind=Kind.STORE, times=1)
        watched.levels.look()
        if second == 20:
            assert watched.levels.effects("shard-0").allow_writes
    assert watched.levels.of(["shard-0"]) is Level.READONLY
    assert watched.levels.of(["shard-1"]) is Level.NORMAL


@pytest.mark.parametrize("reads_fail", [False, True])
def test_a_primary_that_is_gone_is_not_taken_for_one_that_is_only_read(reads_fail: bool) -> None:
    """Nobody reads there, so that the breaker for reads stays closed; or those who do hear nothing either."""
    watched = Watched()
    watched.call("shard-0", times=3, took_s=0.001)
    for _ in range(120):
        watched.clock.pass_(1)
        watched.call("shard-0", Unavailable("gone"), kind=Kind.STORE, times=1, took_s=0.001)
        if reads_fail:
            watched.call("shard-0", Unavailable("gone"), kind=Kind.SEARCH, times=1, took_s=0.001)
        watched.levels.look()
        assert watched.levels.effects("shard-0").allow_writes


def test_nor_is_one_whose_searches_fail() -> None:
    watched = Watched()
    for _ in range(60):
        watched.clock.pass_(1)
        watched.call("shard-0", times=3, took_s=0.001)
        for kind in (Kind.STORE, Kind.SEARCH):
            watched.call("shard-0", Unavailable("gone"), kind=kind, times=1, took_s=0.001)
        watched.levels.look()
        assert watched.levels.effects("shard-0").allow_writes


def test_nor_is_one_whose_replica_is_read() -> None:
    watched = Watched()
    replica = watched.guards.of("shard-0", "replica-0")
    for _ in range(60):
        watched.clock.pass_(1)
        watched.call("shard-0", Unavailable("gone"), kind=Kind.STORE, times=1, took_s=0.001)
        with replica.passing(Kind.RETRIEVE, "Get", Priority.INTERACTIVE):
            watched.clock.pass_(0.001)
        watched.levels.look()
        assert watched.levels.effects("shard-0").allow_writes


def test_a_shard_that_stores_nothing_and_answers_looks_becomes_read_only_though_nobody_reads() -> None:
    watched = Watched()
    for _ in range(40):
        watched.clock.pass_(1)
        watched.call("shard-0", Unavailable("disk full"), kind=Kind.STORE, times=1)
        watched.guards.of("shard-0").heard()
        watched.levels.look()
    assert not watched.levels.effects("shard-0").allow_writes


def test_a_shard_that_stores_takes_writes_though_all_others_are_read_only() -> None:
    watched = Watched()
    for _ in range(40):
        watched.clock.pass_(1)
        for shard_id in _SHARDS:
            watched.call(shard_id, times=3, took_s=0.001)
        for shard_id in _SHARDS[1:]:
            watched.call(shard_id, Unavailable("disk full"), kind=Kind.STORE, times=1)
        watched.levels.look()
    assert not watched.levels.effects("shard-1").allow_writes
    assert not watched.levels.effects("shard-2").allow_writes
    assert watched.levels.effects("shard-0").allow_writes


def test_a_breaker_that_waits_for_somebody_to_try_it_is_no_reason_to_refuse_writes() -> None:
    watched = Watched()
    for _ in range(5):
        watched.call("shard-0", Unavailable("gone"), kind=Kind.STORE, times=1)
    watched.guards.of("shard-0").heard()
    for _ in range(120):
        watched.clock.pass_(1)
        watched.call("shard-0", times=3, took_s=0.001)
        watched.levels.look()
        assert watched.levels.effects("shard-0").allow_writes


async def test_a_read_only_shard_refuses_writes_without_being_asked_and_serves_reads() -> None:
    async with servers(0) as (primary, _), router(primary) as reader:
        reader.shards.levels.override({"shard-0": Level.READONLY})
        with pytest.raises(ReadOnly):
            await reader.store()
        assert not primary.asked
        assert await reader.get(STRONG) == "primary"


def test_a_shard_on_a_busy_machine_gives_up_more_when_it_sheds_or_is_slow_and_nothing_otherwise() -> None:
    watched = Watched()
    watched.levels.busy["shard-0"] = Busy(cpu=0.95, memory=0.99)
    watched.watch(60)
    assert watched.levels.of(_SHARDS) is Level.NORMAL
    for _ in range(10):
        watched.guards.of("shard-0").lately.shed.add(20)
        watched.watch(1)
    assert watched.levels.of(["shard-0"]) is Level.REDUCED
    for _ in range(10):
        for shard_id in _SHARDS[:2]:
            watched.guards.of(shard_id).lately.shed.add(20)
        watched.watch(1, *_SHARDS[:2], took_s=0.3)
    # With both, as another does not that is as slow and sheds as much, where there is CPU to spare.
    assert watched.levels.of(["shard-0"]) is Level.ESSENTIAL
    assert watched.levels.of(["shard-1"]) is Level.REDUCED


def test_a_full_pool_reduces_its_shard_and_nobody_else() -> None:
    watched = Watched()
    watched.levels.pool_use["shard-0"] = 1.0
    watched.watch(7)
    assert watched.levels.vitals["shard-0"].pool_use == 1.0
    assert watched.levels.of(["shard-0"]) is Level.REDUCED
    assert watched.levels.of(["shard-1"]) is Level.NORMAL
    del watched.levels.pool_use["shard-0"]
    watched.watch(40)
    assert watched.levels.of(["shard-0"]) is Level.NORMAL
