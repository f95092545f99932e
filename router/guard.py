"""What stands before a server of a shard: a limit of calls in flight, and a breaker for each kind of call.

Each server has its own, so that one which is slow or gone costs those their time who need it, and nobody else. A call
that is refused here reaches nobody, and its caller hears so at once.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from common.breaker import UNDECIDED_S, CircuitBreaker, Permit, State, speaks_of_callee
from common.breaker_log import logged
from common.breaker_settings import SHARD
from common.errors import DeadlineExceeded, MemshardError, ResourceExhausted
from common.hedge import LatencyWindow
from common.limiter import Admission, Limiter, Priority
from common.limiter_settings import SERVER
from common.telemetry.instruments import Counter
from common.telemetry.registry import BREAKER_OPENED, SERVER_CALL_DURATION, SERVER_CALLS, SHED
from common.topology import server_name
from common.waiting_room import WaitingRoom
from common.window import SlidingCount

Clock = Callable[[], float]

# Seconds that a failure says something of a breaker that is half-open: the health monitor tries more often than that.
_FAILURE_HOLDS_S = 20.0
# Seconds that an answer says that a server is there. While something is wrong with it, it is looked at four times a
# second; a server that is gone is not to be taken for one that is read for the half minute after which that counts.
_ANSWER_HOLDS_S = 10.0
# Between two looks whether probes were answered, which takes some milliseconds.
_PROBED_EVERY_S = 0.005

TALLY_S = 10
"""Seconds that the tally looks back on which people are shown."""

LATELY_S = 4
"""Seconds that the tally looks back on from which levels are decided: less than a level takes to be entered
(`common.level`), so that what happened in one moment is out of sight before it could be taken for lasting."""


# Slots whose calls that took too long are remembered.
_MOST_SLOTS = 1000

_SHED = SHED.labels("server")


class Kind(StrEnum):
    """Kinds of calls that fail for causes of their own: a full disk stores nothing, and is read all the same."""

    STORE = "store"
    RETRIEVE = "retrieve"
    SEARCH = "search"


class Tally:
    """What became of the calls of the last `window_s` seconds."""

    def __init__(self, window_s: int, clock: Clock) -> None:
        self.answered = SlidingCount(1.0, window_s, clock)
        self.failed = SlidingCount(1.0, window_s, clock)
        self.shed = SlidingCount(1.0, window_s, clock)
        self.latency = LatencyWindow(window_s, clock)
        """Of interactive calls that were answered, in seconds. Not of wide ones, which take as long as there is data:
        one dashboard's would be taken for everybody's."""


class Guard:
    """The guard of one server. `name` is what agents may know it by."""

    def __init__(self, shard_id: str, name: str, clock: Clock) -> None:
        self.name = name
        self.attributes = {"rpc.system.name": "grpc", "memshard.server": name, "memshard.shard": shard_id}
        """Of the span of a call."""
        self.limiter = Limiter(clock, SERVER)
        self.tally = Tally(TALLY_S, clock)
        self.lately = Tally(LATELY_S, clock)
        self._queue = WaitingRoom(self.limiter, clock)
        self._durations = {kind: SERVER_CALL_DURATION.labels(name, kind.value) for kind in Kind}
        self._ended: dict[tuple[Kind, str], Counter] = {}
        self.breakers = {kind: logged(name, SHARD, kind.value, clock) for kind in Kind}
        self._clock = clock
        self._has_left = False
        self._heard_at = -math.inf
        # When it last answered a read, or a look that went through its database.
        self._read_at = -math.inf
        # When a call of a kind was last found to have failed; nothing while the last one had an answer.
        self._failed_at: dict[Kind, float] = {}
        # When the last calls of a slot were that took too long, and counted.
        self._too_long: dict[tuple[Kind, int | None], deque[float]] = {}

    @contextmanager
    def passing(
        self, kind: Kind, call: str, priority: Priority, slot: int | None = None, *, wide: bool = False
    ) -> Iterator[None]:
        """`with` it: one call, whose errors say how it went. `call` names calls that take about as long as each other,
        `slot` is the one slot that it is about; None: it is about many. `wide`: it is about all users.

        Raises Unavailable / BREAKER_OPEN or ResourceExhausted / OVERLOADED, before anything is asked.
        """
        permit = self.breakers[kind].admit()
        try:
            admission = self._admitted(call, priority)
        except ResourceExhausted:
            permit.ignore()
            raise
        began = self._clock()
        try:
            yield
        except MemshardError as error:
            waited_s = self._clock() - began
            self._count(kind, error.code.name)
            if isinstance(error, DeadlineExceeded) and not self._speaks_for_all(kind, slot, waited_s):
                raise  # Of a caller in a hurry, or of one alone: nobody else is to feel it.
            if speaks_of_callee(error):
                _judge(permit, error, waited_s)
                self._tell(lambda tally: tally.failed.add())
                self._failed_at[kind] = self._clock()
            else:
                permit.success(self._judged_s(kind, slot, waited_s, priority))
                self._answered(kind)
            if isinstance(error, DeadlineExceeded | ResourceExhausted):
                admission.release(waited_s, dropped=True)
            elif not speaks_of_callee(error):
                admission.release(waited_s)
            raise
        else:
            took_s = self._clock() - began
            permit.success(self._judged_s(kind, slot, took_s, priority))
            self._count(kind, "OK")
            self._durations[kind].observe(took_s)
            admission.release(took_s)
            self._answered(kind)
            if kind is not Kind.STORE:
                self._read_at = self._clock()
            if priority is Priority.INTERACTIVE and not wide:
                self._tell(lambda tally: tally.latency.add(took_s))
        finally:
            # Of a call that its caller gave up, and of one that failed at once, the time says nothing.
            permit.ignore()
            admission.ignore()

    async def room(self, kind: Kind, priority: Priority) -> None:
        """Waits for a place, for a short time; `passing` is to be entered at once. Raises ResourceExhausted."""
        breaker = self.breakers[kind]
        await _probed(breaker)
        if breaker.refused_for_s():
            return  # Which `passing` will say.
        try:
            await self._queue.room(priority)
        except ResourceExhausted:
            self._shed()
            raise

    def _admitted(self, call: str, priority: Priority) -> Admission:
        try:
            return self.limiter.admit(call, priority)
        except ResourceExhausted:
            self._shed()
            raise

    def _speaks_for_all(self, kind: Kind, slot: int | None, waited_s: float) -> bool:
        """Whether a timeout says something of the server, and not just of whom it befell.

        One user with very many memories, or with little patience for a large search, has timeouts without end where all
        others are served. So those of one slot count a few times, and so do all that are about many slots together: a
        server that is in trouble fails others too. Where there are no others, a few in a row open the breaker all the
        same, and whoever tries it then counts.
        """
        return waited_s >= SHARD.fair_timeout_s and self._counts(kind, slot, SHARD.consecutive_failures)

    def _judged_s(self, kind: Kind, slot: int | None, took_s: float, priority: Priority) -> float:
        """The seconds by which the breaker judges an answer. A slow one says as little of the server as a timeout may,
        and is an answer all the same: those of one slot never open the breaker alone, and batches are long by nature.
        """
        if took_s < SHARD.slow_call_s:
            return took_s
        alone = priority is Priority.BATCH or not self._counts(kind, slot, SHARD.consecutive_failures - 1)
        return 0.0 if alone else took_s

    def _counts(self, kind: Kind, slot: int | None, most: int) -> bool:
        """Whether one more call that took too long is to count, of which `most` do of one slot. If so it has."""
        if self.breakers[kind].state is not State.CLOSED:
            return True
        now = self._clock()
        counted = self._too_long.setdefault((kind, slot), deque(maxlen=SHARD.consecutive_failures))
        if len(counted) >= most and now - counted[-most] < SHARD.window_s:
            return False
        counted.append(now)
        if len(self._too_long) > _MOST_SLOTS:
            del self._too_long[next(iter(self._too_long))]
        return True

    def _answered(self, kind: Kind) -> None:
        self._tell(lambda tally: tally.answered.add())
        self._failed_at.pop(kind, None)

    def _shed(self) -> None:
        self._tell(lambda tally: tally.shed.add())
        _SHED.inc()

    def _tell(self, what: Callable[[Tally], None]) -> None:
        """Has both tallies count something."""
        for tally in (self.tally, self.lately):
            what(tally)

    def retire(self) -> None:
        """The server has left, and its series with it; what is still in flight there makes no new ones."""
        for kind in Kind:
            SERVER_CALL_DURATION.remove(self.name, kind.value)
            BREAKER_OPENED.remove(self.name, kind.value)
        for kind, status in self._ended:
            SERVER_CALLS.remove(self.name, kind.value, status)
        self._has_left = True

    def _count(self, kind: Kind, status: str) -> None:
        if self._has_left:
            return
        if (kind, status) not in self._ended:
            self._ended[kind, status] = SERVER_CALLS.labels(self.name, kind.value, status)
        self._ended[kind, status].inc()

    def refuses(self, kind: Kind) -> bool:
        """Whether a call of this kind would be turned away now by its breaker."""
        return self.breakers[kind].refused_for_s() > 0

    def fails(self, kind: Kind) -> bool:
        """Whether calls of this kind fail: nobody may try at the moment, or who tried a short while ago failed.

        Not whenever the breaker is not closed: one that is half-open and asked nothing knows nothing.
        """
        state = self.breakers[kind].state
        if state is not State.HALF_OPEN:
            return state is State.OPEN
        at = self._failed_at.get(kind)
        return at is not None and self._clock() - at < _FAILURE_HOLDS_S

    @property
    def is_read(self) -> bool:
        """Whether it can be read: nothing says that reads fail, and one was answered lately.

        A breaker that is closed says too little: that of a server that is gone is, until somebody asks for a read.
        """
        if self.fails(Kind.RETRIEVE) or self.fails(Kind.SEARCH):
            return False
        return self._clock() - self._read_at < _ANSWER_HOLDS_S

    @property
    def troubled(self) -> bool:
        """Whether a breaker is not closed, so that it would help to hear from the server."""
        return any(breaker.state is not State.CLOSED for breaker in self.breakers.values())

    def heard(self) -> None:
        """The server has answered a health check, out of its database: calls may try it again, a few each second.

        Enough of these close the breakers of reads, where nobody is trying them and nobody lately failed: they would be
        half-open for as long as nobody reads. That it can be read does not say that it can be written to.
        """
        now = self._read_at = self._clock()
        if now - self._heard_at < SHARD.first_probe_s:
            return  # What hangs though health checks are answered is not to be given more and more calls.
        self._heard_at = now
        for breaker in self.breakers.values():
            breaker.probe_succeeded()
        for kind in (Kind.RETRIEVE, Kind.SEARCH):
            breaker = self.breakers[kind]
            if breaker.state is State.HALF_OPEN and not breaker.is_tried and not self.fails(kind):
                breaker.admit().success(0.0)


class Guards:
    """The guards of all servers, by shard and, within it, by replica; None is the primary."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._guards: dict[tuple[str, str | None], Guard] = {}

    def of(self, shard_id: str, replica_id: str | None = None) -> Guard:
        """The guard of one server, made when it is first needed."""
        key = shard_id, replica_id
        if key not in self._guards:
            self._guards[key] = Guard(shard_id, server_name(shard_id, replica_id), self._clock)
        return self._guards[key]

    def keep(self, servers: set[tuple[str, str | None]]) -> None:
        """Drops the guards of all others."""
        for key in self._guards.keys() - servers:
            self._guards.pop(key).retire()

    def by_shard(self) -> dict[str, dict[str | None, Guard]]:
        """Those that there are, by shard and then by replica; None is the primary."""
        grouped: dict[str, dict[str | None, Guard]] = {}
        for (shard_id, replica_id), guard in self._guards.items():
            grouped.setdefault(shard_id, {})[replica_id] = guard
        return grouped


async def _probed(breaker: CircuitBreaker) -> None:
    """Waits for what others are just finding out. All who were refused were told to come back at the same time: the
    first few of them try, and the rest would be refused once more, though the server is well.
    """
    for _ in range(math.ceil(UNDECIDED_S / _PROBED_EVERY_S)):
        if not breaker.undecided_for_s():
            return
        await asyncio.sleep(_PROBED_EVERY_S)


def _judge(permit: Permit, error: MemshardError, waited_s: float) -> None:
    if isinstance(error, DeadlineExceeded):
        permit.timeout(waited_s)
    else:
        permit.failure()
