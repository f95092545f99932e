"""The plan: which slots go where, so that shards have slots by their weights with the fewest slots moved. Pure.

Shards with the status active share the slots by weight; a draining one is to have none. Shards that are readonly or in
maintenance keep what they have and get nothing. Slots that are pinned to a shard belong there, and count for nobody.
What would keep a draining shard from ever being empty does not count: a pin to it, and one of a slot of its own to a
shard that takes none.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from common.slots import SLOT_COUNT, as_ranges
from common.topology import GIVES, TAKES, ShardStatus, Topology


class PlanError(Exception):
    """There is no way to do what is wanted; the message says why."""


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """Slots `first` to `last`, both included, from one shard to another."""

    first: int
    last: int
    source: str
    target: str

    @property
    def slots(self) -> int:
        """How many they are."""
        return self.last - self.first + 1


def plan(
    topology: Topology,
    *,
    pins: Mapping[int, str] | None = None,
    max_slots: int = 1024,
    draining: Collection[str] = (),
) -> list[PlannedMove]:
    """The moves that reach the weights, each of at most `max_slots`; none when they are reached.

    `draining` are shards to be treated as if their status said so. Raises PlanError when slots are to go, and no shard
    is active.
    """
    if max_slots < 1:
        raise ValueError("max_slots must be 1 or more")
    status = {s.shard_id: ShardStatus.DRAINING if s.shard_id in draining else s.status for s in topology.shards}
    weights = {s.shard_id: s.weight for s in topology.shards if status[s.shard_id] in TAKES}
    owned = {s.shard_id: _slots_of(topology, s.shard_id) for s in topology.shards}
    pins = {slot: to for slot, to in (pins or {}).items() if _counts(status, topology.owner(slot).shard_id, to)}
    wanted = _pinned(owned, status, pins)
    free = {
        shard_id: [slot for slot in slots if slot not in pins]
        for shard_id, slots in owned.items()
        if status[shard_id] in GIVES
    }
    total = sum(map(len, free.values()))
    if not weights:
        if total and any(free[shard_id] for shard_id in free if status[shard_id] is ShardStatus.DRAINING):
            raise PlanError("no shard is active that could take the slots")
        quotas = {shard_id: len(slots) for shard_id, slots in free.items()}
    else:
        quotas = _quotas(weights, {shard_id: len(slots) for shard_id, slots in free.items()}, total)
    # From the end of what a shard has: what stays is in few ranges, and so is what goes.
    surplus = {shard_id: slots[quotas.get(shard_id, 0) :] for shard_id, slots in free.items()}
    for target in sorted(weights):
        lacking = quotas[target] - len(free.get(target, ()))
        for source in sorted(surplus):
            if lacking <= 0:
                break
            taken, surplus[source] = surplus[source][:lacking], surplus[source][lacking:]
            wanted.update(dict.fromkeys(taken, (source, target)))
            lacking -= len(taken)
    return _in_ranges(wanted, max_slots)


def by_hand(topology: Topology, first: int, last: int, target: str, *, max_slots: int = 1024) -> list[PlannedMove]:
    """The moves that take slots `first` to `last` to `target`. Raises PlanError when that cannot be."""
    if not 0 <= first <= last < SLOT_COUNT:
        raise PlanError(f"slots are 0 to {SLOT_COUNT - 1}, the first before the last")
    status = {shard.shard_id: shard.status for shard in topology.shards}
    source = topology.owner(first).shard_id
    if not any(begin <= first and last <= end for begin, end in topology.ranges_of(source)):
        raise PlanError(f"slots {first} to {last} are not all of one shard")
    if status.get(target) not in TAKES or source == target or status[source] not in GIVES:
        raise PlanError(f"slots cannot go from {source} to {target}")
    return _in_ranges(dict.fromkeys(range(first, last + 1), (source, target)), max_slots)


def _slots_of(topology: Topology, shard_id: str) -> list[int]:
    return [slot for first, last in topology.ranges_of(shard_id) for slot in range(first, last + 1)]


def _counts(status: Mapping[str, ShardStatus], owner: str, pinned_to: str) -> bool:
    """Whether a pin is kept to. A slot of a draining shard that cannot go where it belongs goes elsewhere meanwhile."""
    if status[owner] is ShardStatus.DRAINING:
        return status.get(pinned_to) in TAKES
    return status.get(pinned_to) is not ShardStatus.DRAINING


def _pinned(
    owned: Mapping[str, list[int]], status: Mapping[str, ShardStatus], pins: Mapping[int, str]
) -> dict[int, tuple[str, str]]:
    """The pinned slots that are elsewhere, with where they are and belong. One that cannot go there stays."""
    return {
        slot: (source, pins[slot])
        for source, slots in owned.items()
        for slot in slots
        if slot in pins and pins[slot] != source and status[source] in GIVES and status.get(pins[slot]) in TAKES
    }


def _quotas(weights: Mapping[str, int], have: Mapping[str, int], total: int) -> dict[str, int]:
    """How many slots each shard is to have: its exact share rounded down, or up where it has more than that already.

    Rounding up goes first to those who have the slots: each slot that stays is one that need not be moved.
    """
    whole = sum(weights.values())
    quotas = {shard_id: total * weight // whole for shard_id, weight in weights.items()}
    left = total - sum(quotas.values())
    remainder = {shard_id: total * weight % whole for shard_id, weight in weights.items()}
    inexact = [shard_id for shard_id in weights if remainder[shard_id]]
    inexact.sort(key=lambda s: (have.get(s, 0) <= quotas[s], -remainder[s], s))
    for shard_id in inexact[:left]:
        quotas[shard_id] += 1
    return quotas


def _in_ranges(wanted: Mapping[int, tuple[str, str]], max_slots: int) -> list[PlannedMove]:
    moves = []
    for source, target in sorted(set(wanted.values())):
        for first, last in as_ranges(slot for slot, way in wanted.items() if way == (source, target)):
            moves += [
                PlannedMove(begin, min(begin + max_slots - 1, last), source, target)
                for begin in range(first, last + 1, max_slots)
            ]
    return moves
