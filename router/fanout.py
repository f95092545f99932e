"""One question to every shard: concurrently, bounded, within the caller's time, with whoever failed on record."""

import asyncio
import copy
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from common import tracing
from common.deadline import Deadline
from common.errors import MemshardError, Unavailable, WrongShard
from common.status import to_status
from common.topology import Shard
from memshard.v1 import memory_pb2 as pb
from router.consistency import STRONG, Consistency
from router.dispatch import set_route, still_moving
from router.following import Following
from router.reads import Reads, Role
from router.report import Origin
from router.retries import Retries
from router.shards import Q, R, Rpc
from router.topology_watch import TopologyWatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gathered(Generic[R]):
    """What the shards answered, in the order of their ids, and why the others did not."""

    answers: tuple[tuple[Shard, R], ...]
    failed: tuple[tuple[Shard, MemshardError], ...]
    served_by: frozenset[Role] = frozenset()
    """The kinds of servers that answered."""

    @property
    def origin(self) -> Origin:
        """For its report."""
        summary = pb.ShardSummary(
            total=len(self.answers) + len(self.failed),
            succeeded=len(self.answers),
            failed=[pb.ShardFailure(shard_id=shard.shard_id, status=to_status(error)) for shard, error in self.failed],
        )
        asked = frozenset(shard.shard_id for shard, _ in (*self.answers, *self.failed))
        return Origin(asked, self.served_by, summary)

    def require_all(self) -> None:
        """Raises Unavailable / SHARDS_MISSING when a shard failed."""
        if self.failed:
            names = ", ".join(f"{shard.shard_id} ({error.reason})" for shard, error in self.failed)
            raise Unavailable(f"these shards did not answer: {names}", reason="SHARDS_MISSING")

    def require_any(self) -> None:
        """Raises Unavailable / SHARDS_MISSING when every shard failed: an empty answer would be a lie."""
        if not self.answers:
            self.require_all()


class Fanout:
    """Asks all shards that own slots, at most `concurrency` at a time for one question."""

    def __init__(self, watch: TopologyWatch, reads: Reads, retries: Retries, *, concurrency: int) -> None:
        self._watch = watch
        self._reads = reads
        self._retries = retries
        self._concurrency = concurrency

    async def ask_all(
        self, rpc: Rpc[Q, R], question: Q, deadline: Deadline, consistency: Consistency = STRONG
    ) -> Gathered[R]:
        """The answers of all shards to `question`, each with a route of its own, of servers that are fresh enough.

        Each shard answers for exactly the slots that one snapshot gives it. When one says that the snapshot is stale,
        all are asked again by a newer one: answers by two snapshots could miss a slot, or count it twice.
        """
        following = Following(self._watch, deadline, self._retries.budget)
        while True:
            gathered = await self._round(rpc, question, consistency, deadline)
            stale = [error for _, error in gathered.failed if isinstance(error, WrongShard)]
            if not stale:
                return gathered
            if not await following.again(stale):
                break
        failed = tuple(
            (shard, still_moving() if isinstance(error, WrongShard) else error) for shard, error in gathered.failed
        )
        return replace(gathered, failed=failed)

    async def _round(self, rpc: Rpc[Q, R], question: Q, consistency: Consistency, deadline: Deadline) -> Gathered[R]:
        topology = self._watch.topology
        wanted = consistency.under(topology.cutovers)
        places = asyncio.Semaphore(self._concurrency)
        answers: list[tuple[Shard, R]] = []
        failed: list[tuple[Shard, MemshardError]] = []
        roles: set[Role] = set()

        async def ask(shard: Shard) -> None:
            request = copy.deepcopy(question)
            set_route(request, topology, shard, topology.ranges_of(shard.shard_id))
            try:
                async with places:
                    # Retries and hedges are events of this span.
                    with tracing.span(f"ask {shard.shard_id}", {"memshard.shard": shard.shard_id}):
                        answer, role = await self._retries.run(
                            lambda: self._reads.ask(shard, rpc, request, wanted, deadline), deadline
                        )
                answers.append((shard, answer))
                roles.add(role)
            except MemshardError as error:
                failed.append((shard, error))

        asked = topology.serving()
        self._reads.shards.levels.tell_trace(shard.shard_id for shard in asked)
        with tracing.span("fan-out", {"memshard.shards.asked": len(asked)}) as span:
            async with asyncio.TaskGroup() as group:
                for shard in asked:
                    group.create_task(ask(shard))
            span.set("memshard.shards.failed", len(failed))
        # A shard that is in neither list would be missing from the answer without a word.
        assert len(answers) + len(failed) == len(asked)
        return Gathered(_by_id(answers), _by_id(failed), frozenset(roles))


def _by_id(items: list[tuple[Shard, T]]) -> tuple[tuple[Shard, T], ...]:
    return tuple(sorted(items, key=lambda item: item[0].shard_id))
