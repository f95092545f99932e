"""Degradation levels: what is given up, and when, so that the rest goes on. Pure.

A level is entered when its cause has lasted, and left when it has been well below its threshold for longer: between the
two thresholds nothing changes, whatever the noise (a Schmitt trigger with dwell times). Each level is a latch of its
own, and the level in force is the highest that is on. A shard has a decider, and so has the cluster; whoever answers
for a shard goes by the higher of the two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import reduce

from common.vitals import Vitals


class Level(IntEnum):
    """The numbers are those of `memshard.v1.DegradationLevel`."""

    NORMAL = 1
    REDUCED = 2
    ESSENTIAL = 3
    READONLY = 4
    MAINTENANCE = 5


class Fallback(StrEnum):
    """What a search by meaning may answer with when vectors cannot be had; the answer says that it is one."""

    KEYWORD = "keyword"
    MOST_RECENT = "most_recent"


@dataclass(frozen=True, slots=True)
class Effects:
    """What a level does, in the order of the columns below."""

    patience: float
    """Share of the usual slowdown that is put up with, so that the limit of calls in flight is lower
    (`Limiter.patience`)."""

    batch_factor: float
    """Share of the usual room for batches (`Limiter.batch_share`): what is let in of them is less, not smaller."""

    index_instead_of_exact: bool
    """A large user's search goes to that user's index, where there is one, though an exact one was possible."""

    fallbacks: frozenset[Fallback]
    """What may stand in for vectors that are down."""

    allow_writes: bool
    """Without, writes are refused: FAILED_PRECONDITION / READ_ONLY."""

    serving: bool
    """What a router's gRPC health service says, at the cluster's level. At a shard's it says nothing of it: the others
    are served, and so are reads of that one. A shard whose reads are to stop too is given the status `maintenance`.
    """

    def strictest(self, other: "Effects") -> "Effects":
        """What both do at once."""
        if other is self:
            return self
        return Effects(
            min(self.patience, other.patience),
            min(self.batch_factor, other.batch_factor),
            self.index_instead_of_exact or other.index_instead_of_exact,
            self.fallbacks | other.fallbacks,
            self.allow_writes and other.allow_writes,
            self.serving and other.serving,
        )


_KEYWORD = frozenset({Fallback.KEYWORD})
_ANY = frozenset(Fallback)

# Keyword search stands in for a dead embedder at once and at every level: nobody is helped by errors until one changes.
# Reduced and essential answer to load. Read-only and maintenance do not, so they leave reads as they are.
# What a cache has that is fresh enough is not asked of a shard at any level, so no column says so.
# Six tenths of the usual patience is a slowdown of 1.2, with which a service is still as busy as it can be.
# fmt: off
WHAT_EACH_LEVEL_DOES = {
    #                       patience batch  index  fallbacks  writes  serving
    Level.NORMAL:      Effects(1.00,  1.00,  False, _KEYWORD,  True,   True),
    Level.REDUCED:     Effects(0.75,  0.50,  True,  _KEYWORD,  True,   True),
    Level.ESSENTIAL:   Effects(0.60,  0.25,  True,  _ANY,      True,   True),
    Level.READONLY:    Effects(1.00,  1.00,  False, _ANY,      False,  True),
    Level.MAINTENANCE: Effects(1.00,  1.00,  False, _ANY,      False,  False),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From which value on a figure asks for a level; never, where a threshold is infinite."""

    reduced: float
    essential: float = math.inf

    def level(self, value: float, factor: float) -> Level:
        """The level that `value` asks for, with the thresholds multiplied by `factor`."""
        if value >= self.essential * factor:
            return Level.ESSENTIAL
        return Level.REDUCED if value >= self.reduced * factor else Level.NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSettings:
    """What enters which level, and how long it must last.

    | figure              | reduced | essential | by itself?                                                       |
    |---------------------|---------|-----------|------------------------------------------------------------------|
    | error rate          | 5 %     | 10 %      | yes                                                              |
    | p99 latency         | 200 ms  | 500 ms    | yes                                                              |
    | open breakers       | 25 %    | 50 %      | yes                                                              |
    | pool in use         | 95 %    |           | yes                                                              |
    | CPU                 | 75 %    | 90 %      | no: reduced with latency (200 ms) or shedding over its limit,    |
    |                     |         |           | essential with both; a busy machine that keeps up is no fault    |
    | memory              | 85 %    |           | no: reduced as for CPU                                           |
    | shedding            | 5 %     |           | no: refusals are no errors, but how a limiter copes              |

    Read-only is entered by hand, or when a primary has stored nothing for 30 s while it answers reads: longer than a
    failover takes, in which writers do better with UNAVAILABLE, for which they come back. So they do while a primary is
    gone, for however long. Maintenance is only entered by hand.

    CPU, memory, latency and errors are the source guide's; shedding has that of errors. A quarter of a shard's breakers
    is one kind of operation on primary and replica, half is a dead primary. 95 % of a pool is all but one of twenty.
    """

    error_rate: Thresholds = Thresholds(0.05, 0.10)
    p99_latency_s: Thresholds = Thresholds(0.2, 0.5)
    open_breakers: Thresholds = Thresholds(0.25, 0.5)
    pool_use: Thresholds = Thresholds(0.95)
    cpu: Thresholds = Thresholds(0.75, 0.90)
    memory: Thresholds = Thresholds(0.85)
    shed_share: Thresholds = Thresholds(0.05)

    leave_factor: float = 0.8
    """A level is left below its thresholds times this: noise of a fifth does not make it flap."""

    enter_after_s: float = 5.0
    """Seconds that a cause must last: shorter than what people notice, longer than a restart or a pause."""

    leave_after_s: float = 30.0
    """Seconds of being well before a level is left: load that comes back at once finds it still on."""

    readonly_after_s: float = 30.0
    """Seconds of no write path before writes are refused."""

    writable_after_s: float = 2.0
    """Seconds of a write path before writes are taken again: more than one look. Less than what enters other levels, as
    this one cannot flap: it takes half a minute of no write path to come back."""

    def asked_for(self, vitals: Vitals, factor: float = 1.0) -> Level:
        """What load and failures ask for at this moment; `factor` multiplies every threshold."""
        slow = self.p99_latency_s.level(vitals.p99_latency_s, factor)
        shedding = self.shed_share.level(vitals.shed_share, factor)
        busy = max(self.cpu.level(vitals.cpu, factor), self.memory.level(vitals.memory, factor))
        # Busy and neither slow nor shedding is normal, with one of them reduced, with both what it says itself.
        witnesses = (slow > Level.NORMAL) + (shedding > Level.NORMAL)
        return max(
            self.error_rate.level(vitals.error_rate, factor),
            slow,
            self.open_breakers.level(vitals.open_breakers, factor),
            self.pool_use.level(vitals.pool_use, factor),
            min(busy, Level(Level.NORMAL + witnesses)),
        )


class LevelDecider:
    """The level of one shard, or of the cluster. `observe` at regular intervals of a second or so.

    Calls ask for it several times each, so it is worked out when something changes.
    """

    level: Level
    """The level in force."""
    effects: Effects
    """What the level in force does, together with what the lower ones do that are on beside it."""

    def __init__(self, clock: Callable[[], float], settings: LevelSettings | None = None) -> None:
        self._override: Level | None = None
        self._settings = settings = settings or LevelSettings()
        self._clock = clock
        self._reduced = _Latch(settings.enter_after_s, settings.leave_after_s)
        self._essential = _Latch(settings.enter_after_s, settings.leave_after_s)
        self._readonly = _Latch(settings.readonly_after_s, settings.writable_after_s)
        self._decide()

    @property
    def override(self) -> Level | None:
        """The level that an operator has set, whatever the vitals say; None to decide by them."""
        return self._override

    @override.setter
    def override(self, level: Level | None) -> None:
        self._override = level
        self._decide()

    def observe(self, vitals: Vitals) -> Level:
        """Takes a look into account, also while overridden; the level after it."""
        now = self._clock()
        wanted = self._settings.asked_for(vitals)
        held = self._settings.asked_for(vitals, self._settings.leave_factor)
        self._reduced.observe(now, wanted >= Level.REDUCED, held >= Level.REDUCED)
        self._essential.observe(now, wanted >= Level.ESSENTIAL, held >= Level.ESSENTIAL)
        self._readonly.observe(now, vitals.writes_down, vitals.writes_down)
        self._decide()
        return self.level

    def _decide(self) -> None:
        in_force = self._in_force()
        self.level = max(in_force)
        self.effects = reduce(Effects.strictest, (WHAT_EACH_LEVEL_DOES[level] for level in in_force))

    def _in_force(self) -> list[Level]:
        if self._override is not None:
            return [self._override]
        latches = {
            Level.REDUCED: self._reduced,
            Level.ESSENTIAL: self._essential,
            Level.READONLY: self._readonly,
        }
        return [Level.NORMAL, *(level for level, latch in latches.items() if latch.on)]


class _Latch:
    """On after `enter_after_s` of being wanted without a break, off after `leave_after_s` of not even being held."""

    def __init__(self, enter_after_s: float, leave_after_s: float) -> None:
        self.on = False
        self._enter_after_s = enter_after_s
        self._leave_after_s = leave_after_s
        self._since: float | None = None

    def observe(self, now: float, wanted: bool, held: bool) -> None:
        turning = not held if self.on else wanted
        if not turning:
            self._since = None
            return
        if self._since is None:
            self._since = now
        if now - self._since >= (self._leave_after_s if self.on else self._enter_after_s):
            self.on, self._since = not self.on, None
