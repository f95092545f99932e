"""One read of one shard: sent to the server that suits it best, and on to the next, within one deadline.

Replicas that look fresh enough come first, then those that may be by now, each for a short time, then the primary with
what is left. When the primary is away too, a replica that was passed over may still catch up, and is waited for. What
none of them can answer is UNAVAILABLE: an older answer than was asked for is never given.

Going on from a server that has failed is one more attempt, and takes leave of the router's retry budget like any other
(`router.retries`): what one server cannot bear is not to come over the next.

A read of one user that takes longer than most is asked of a second server as well (`router.hedges`).
"""

import asyncio
from collections.abc import Collection
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from common import errors, logs, tracing
from common.breaker import BREAKER_OPEN
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import DeadlineExceeded, MemshardError, Unavailable, WrongShard
from common.hedge import HedgeTimer
from common.topology import Shard
from memshard.internal.v1 import shard_pb2
from router.balance import PRIMARY, Order, order
from router.consistency import Consistency, Wanted
from router.hedges import Hedges
from router.replicas import Replicas
from router.retries import Retries
from router.shards import NO_ANSWER, Q, R, Rpc, Shards

_log = logs.get_logger("reads")

T = TypeVar("T")

Role: TypeAlias = Literal["primary", "replica"]

# What a replica answers that did not catch up in time. It stays inside the cluster.
BEHIND = "REPLICA_BEHIND"

# What a replica says of itself rather than of the request: another server may do better. WRONG_SHARD is among them, as
# what a replica knows of its slots is as old as its rows.
_GO_ON = (Unavailable, DeadlineExceeded, WrongShard, errors.ResourceExhausted, errors.Unimplemented, errors.Internal)

# What is no failure of a server that was asked: a breaker of this router's own let nobody be asked, or one that is well
# said that it is not the one to answer this. Going on then takes no leave.
_NOBODY_FAILED = frozenset({BREAKER_OPEN, BEHIND})
_NOT_THE_ONE = (WrongShard, errors.Unimplemented)

# Longest that a read waits for a replica to catch up, once the primary is away. It may never happen, and the caller
# is told to try again after about as long.
_OUTWAIT_S = 1.0


class Reads:
    """Sends reads to the servers of a shard."""

    def __init__(self, shards: Shards, replicas: Replicas, settings: RouterSettings, retries: Retries) -> None:
        self.shards = shards
        self.replicas = replicas
        self.retries = retries
        self.hedges = Hedges()
        self.wait_s = settings.freshness_wait_s
        self.timeout_s = settings.replica_timeout_s
        self._share = settings.reads == "all"
        self._turn = 0

    async def ask(
        self, shard: Shard, rpc: Rpc[Q, R], request: Q, consistency: Consistency, deadline: Deadline
    ) -> tuple[R, Role]:
        """The answer of a server of `shard` that is fresh enough, and what kind of server that is.

        Raises what the primary raises when it is asked, and no replica can stand in for it; what a replica raised when
        there is no leave to go on from it; Unavailable / NO_FRESH_SERVER when there are replicas, and none is fresh
        enough.
        """
        self.shards.admit(shard, rpc)
        if consistency.strong:
            return await self.shards.call(shard, rpc, request, deadline), "primary"
        reading = _Reading(self, shard, rpc, request, consistency.of(shard.shard_id), deadline)
        return await reading.run(self._order(shard, reading.wanted))

    def _order(self, shard: Shard, wanted: Wanted) -> Order:
        self._turn += 1
        outstanding = {replica.replica_id: self.shards.outstanding(replica.address) for replica in shard.replicas}
        outstanding[PRIMARY] = self.shards.outstanding(shard.address)
        return order(wanted, self.replicas.serving(shard), outstanding, turn=self._turn, share=self._share)


class _Reading(Generic[Q, R]):
    """One read on its way from server to server."""

    def __init__(
        self, reads: Reads, shard: Shard, rpc: Rpc[Q, R], request: Q, wanted: Wanted, deadline: Deadline
    ) -> None:
        self.wanted = wanted
        self._reads = reads
        self._shard = shard
        self._by_id = {replica.replica_id: replica for replica in shard.replicas}
        self._rpc = rpc
        self._request = request
        self._deadline = deadline
        # What is left of the time that replicas may take to catch up: one read waits once, not at each of them.
        self._wait_s = reads.wait_s
        # Why the primary had no answer, once it was asked.
        self._failed: Unavailable | DeadlineExceeded | None = None
        # How the last server that was asked failed, as long as going on from it is not paid for.
        self._unpaid: MemshardError | None = None

    async def run(self, going: Order) -> tuple[R, Role]:
        """Asks one after the other, and two at once where the first takes long."""
        names = list(going.first)
        if names and self._may_hedge():
            self._reads.hedges.read()
        while names:
            self._require_leave()
            if (got := await self._ask_next(names)) is not None:
                return got
        if self._failed is None:
            self._require_leave()
            primary = self._ask_primary(self._deadline.less(self._reserve_s(going)))
            if (got := await primary) is not None:
                return got
        if (got := await self._outwait(going.last)) is not None:
            return got
        assert self._failed is not None, "the primary has neither been asked nor failed"
        raise self._explained(self._failed, going) from self._failed

    async def _ask_next(self, names: list[str]) -> tuple[R, Role] | None:
        """The answer of the first of `names`, or of the one after it when that is hedged; both are taken off then."""
        name = names.pop(0)
        if not self._may_hedge():
            return await self._ask_in_turn(name)
        timer = self._reads.hedges.timer(self._shard.shard_id, self._rpc.name)
        after_s = timer.delay_s()
        if after_s is None:
            return await self._timed(timer, name)
        loop = asyncio.get_running_loop()
        asked = {asyncio.create_task(self._timed(timer, name)): loop.time()}
        try:
            await asyncio.wait(asked, timeout=after_s)
            second = names[0] if names else PRIMARY
            if second != name and not all(task.done() for task in asked) and self._reads.hedges.spend():
                del names[:1]
                tracing.current().event("hedge", {"memshard.server": second, "memshard.after_ms": after_s * 1000})
                asked[asyncio.create_task(self._timed(timer, second))] = loop.time()
            got = await _first_answer(asked)
            for task, began in asked.items():
                if not task.done():
                    timer.observe(loop.time() - began)  # The slower one would have taken longer than that.
            return got
        finally:
            for task in asked:
                # What became of the slower one is nobody's to hear, but the event loop would complain.
                task.add_done_callback(_hear)
                task.cancel()

    async def _timed(self, timer: HedgeTimer, name: str) -> tuple[R, Role] | None:
        """The same as `_ask_in_turn`; how long answers take is noted. How soon a refusal comes says nothing of that."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        got = await self._ask_in_turn(name)
        if got is not None:
            timer.observe(loop.time() - began)
        return got

    async def _ask_in_turn(self, name: str) -> tuple[R, Role] | None:
        """The answer of a server that is not the last hope, and so gets a part of the time."""
        part = Deadline.after(self._deadline.remaining_s() / 2)
        if name == PRIMARY:
            return await self._ask_primary(part)
        timeout_s = part.remaining_s() if self._wide() else min(part.remaining_s(), self._reads.timeout_s)
        return await self._ask_replica(name, timeout_s, min(self._wait_s, timeout_s / 2))

    async def _ask_primary(self, deadline: Deadline) -> tuple[R, Role] | None:
        """The answer of the primary; None when it has none, which is kept."""
        # It is told what was asked for as well: one that has been replaced, and does not know it yet, is behind too.
        request = self._asking_for_freshness(0.0)
        try:
            return await self._reads.shards.call(self._shard, self._rpc, request, deadline), "primary"
        except (Unavailable, DeadlineExceeded) as error:
            self._failed = error
            self._owe(error)
            return None

    async def _ask_replica(self, name: str, timeout_s: float, wait_s: float) -> tuple[R, Role] | None:
        """The answer of a replica; None when somebody else has to give it."""
        replica, replicas = self._by_id[name], self._reads.replicas
        if timeout_s <= 0:
            return None
        request = self._asking_for_freshness(wait_s)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            answer = await self._reads.shards.call_replica(
                self._shard, replica, self._rpc, request, timeout_s=timeout_s
            )
        except _GO_ON as error:
            self._owe(error)
            if error.reason == BEHIND:
                self._wait_s = max(0.0, self._wait_s - (loop.time() - began))
                replicas.refused(self._shard, replica, self.wanted)
            elif isinstance(error, Unavailable | DeadlineExceeded):
                replicas.failed(self._shard, replica)
            elif isinstance(error, errors.Internal):
                # A bug of its own, or of its data: the caller is spared it, the operator is not.
                _log.error("a replica failed a read by a bug", shard=self._shard.shard_id, replica=name)
            return None
        replicas.answered(self._shard, replica, self.wanted)
        return answer, "replica"

    async def _outwait(self, names: tuple[str, ...]) -> tuple[R, Role] | None:
        """The answer of a replica that catches up in time; None when none does."""
        # Without the last of the caller's time, in which to say that there is no answer.
        until = Deadline.after(min(_OUTWAIT_S, self._deadline.remaining_s() * 3 / 4))
        for number, name in enumerate(names):
            if not self._has_leave():
                return None
            share_s = until.remaining_s() / (len(names) - number)
            # What is not waited is for the answer, or for hearing that there is none.
            got = await self._ask_replica(name, share_s, share_s - min(share_s / 2, self._reads.timeout_s))
            if got is not None:
                return got
        return None

    def _owe(self, error: MemshardError) -> None:
        """A server was to answer, and did not: going on has to be paid for, unless it was not its fault."""
        if error.reason not in _NOBODY_FAILED and not isinstance(error, _NOT_THE_ONE):
            self._unpaid = error

    def _has_leave(self) -> bool:
        """Whether one more server may be asked."""
        if self._unpaid is not None and not self._reads.retries.withdraw():
            return False
        self._unpaid = None
        return True

    def _require_leave(self) -> None:
        """Raises how the last one failed when no other may be asked."""
        if not self._has_leave():
            assert self._unpaid is not None
            if isinstance(self._unpaid, DeadlineExceeded):
                # Its part of the time is up, which does not say that the caller's is.
                raise Unavailable(
                    f"{self._unpaid.message}, and too much is tried again already to ask another", reason=NO_ANSWER
                ) from self._unpaid
            raise self._unpaid

    def _reserve_s(self, going: Order) -> float:
        """What is kept back from the primary, so that a replica can stand in for one that hangs."""
        return min(self._reads.timeout_s, self._deadline.remaining_s() / 4) if going.last else 0.0

    def _asking_for_freshness(self, wait_s: float) -> Q:
        """The request with what is asked of one server; a copy, as two may be asked at once."""
        # Through bytes, which copies an embedding of 1,536 numbers in 1 µs; CopyFrom takes 13.
        request = type(self._request).FromString(self._request.SerializeToString())
        route: shard_pb2.Route = request.route  # type: ignore[attr-defined]  # Every request of a read has one.
        route.fresh.CopyFrom(self.wanted.freshness(self._shard.shard_id, int(wait_s * 1000)))
        return request

    def _may_hedge(self) -> bool:
        """Whether a second server may be asked while the first has not answered."""
        return bool(self._by_id) and not self._wide()

    def _wide(self) -> bool:
        """Whether this may take long wherever it is asked. A replica that falls silent meanwhile is still found out:
        what is in flight there is abandoned when it is lost."""
        request: Any = self._request
        return isinstance(request, shard_pb2.SearchRequest) and not request.user_id

    def _explained(self, failed: Unavailable | DeadlineExceeded, going: Order) -> Unavailable | DeadlineExceeded:
        """Why there is no answer, for the caller."""
        if not going.last and failed.reason != BEHIND:
            return failed
        return Unavailable(
            f"the primary of {self._shard.shard_id} does not answer, and no replica is fresh enough",
            reason="NO_FRESH_SERVER",
        )


async def _first_answer(asked: Collection[asyncio.Task[T | None]]) -> T | None:
    """The first result that is one; else the first error; None when there is neither."""
    pending, failed = set(asked), None
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = task.exception()
            if error is not None:
                # Of two, the one may be overloaded while the other answers.
                failed = failed or error
            elif (result := task.result()) is not None:
                return result
    if failed is not None:
        raise failed
    return None


def _hear(task: asyncio.Task[T]) -> None:
    if not task.cancelled():
        task.exception()
