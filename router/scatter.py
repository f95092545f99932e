"""Many items to the owners of their slots: grouped by shard, concurrently, each item with an outcome of its own."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.rpc import status_pb2

from common import tracing
from common.deadline import Deadline
from common.errors import Internal, MemshardError, WrongShard
from common.slots import as_ranges
from common.status import from_status
from common.topology import Shard
from router.dispatch import set_route, still_moving
from router.following import Following
from router.retries import Retries
from router.shards import Q, R, Rpc, Shards
from router.topology_watch import TopologyWatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sending(Generic[T, Q, R]):
    """How items travel."""

    rpc: Rpc[Q, R]
    slot_of: Callable[[T], int]
    request_of: Callable[[Sequence[T]], Q]
    errors_of: Callable[[R], Sequence[status_pb2.Status | None]]
    """What became of each item of a request, in its order; None: it went well."""
    marks_of: Callable[[R], Sequence[bool]] | None = None
    """What else is to be known of each item, if anything."""


@dataclass(frozen=True, slots=True)
class Scattered(Generic[R]):
    """What became of each item, in order, and the answers of the shards that took any."""

    outcomes: tuple[MemshardError | None, ...]
    answers: tuple[tuple[Shard, R], ...]
    marked: frozenset[int] = frozenset()
    """The items that the shards marked."""


class Scatter:
    """Sends items by the snapshot, and those that met a shard without their slots again by a newer one."""

    def __init__(self, watch: TopologyWatch, shards: Shards, retries: Retries) -> None:
        self._watch = watch
        self._shards = shards
        self._retries = retries

    async def send(self, sending: Sending[T, Q, R], items: Sequence[T], deadline: Deadline) -> Scattered[R]:
        """Sends every item once to the owner of its slot. No item's fault is another's."""
        marked: set[int] = set()
        outcomes, answers = await self._round(sending, dict(enumerate(items)), marked, deadline)
        following = Following(self._watch, deadline, self._retries.budget)
        while stale := {number: error for number, error in outcomes.items() if isinstance(error, WrongShard)}:
            if not await following.again(stale.values()):
                outcomes |= dict.fromkeys(stale, still_moving())
                break
            again, more = await self._round(sending, {number: items[number] for number in stale}, marked, deadline)
            outcomes |= again
            answers += more
        return Scattered(tuple(outcomes[n] for n in range(len(items))), tuple(answers), frozenset(marked))

    async def _round(
        self, sending: Sending[T, Q, R], items: dict[int, T], marked: set[int], deadline: Deadline
    ) -> tuple[dict[int, MemshardError | None], list[tuple[Shard, R]]]:
        topology = self._watch.topology
        groups: dict[str, list[int]] = {}
        for number, item in items.items():
            groups.setdefault(topology.owner(sending.slot_of(item)).shard_id, []).append(number)
        self._shards.levels.tell_trace(groups)
        outcomes: dict[int, MemshardError | None] = {}
        answers: list[tuple[Shard, R]] = []

        async def send(numbers: list[int]) -> None:
            group = [items[number] for number in numbers]
            shard = topology.owner(sending.slot_of(group[0]))
            request = sending.request_of(group)
            set_route(request, topology, shard, as_ranges(sending.slot_of(item) for item in group))
            try:
                with tracing.span(
                    f"send to {shard.shard_id}", {"memshard.shard": shard.shard_id, "memshard.items": len(group)}
                ):
                    answer = await self._retries.run(
                        lambda: self._shards.call(shard, sending.rpc, request, deadline), deadline
                    )
            except MemshardError as error:
                outcomes.update(dict.fromkeys(numbers, error))
                return
            answers.append((shard, answer))
            for number, status in zip(numbers, sending.errors_of(answer), strict=True):
                outcomes[number] = _error(status)
            if sending.marks_of is not None:
                marked.update(n for n, mark in zip(numbers, sending.marks_of(answer), strict=True) if mark)

        async with asyncio.TaskGroup() as tasks:
            for numbers in groups.values():
                tasks.create_task(send(numbers))
        return outcomes, answers


def _error(status: status_pb2.Status | None) -> MemshardError | None:
    if status is None:
        return None
    return from_status(status) or Internal("a shard answered with an error of no known kind")
