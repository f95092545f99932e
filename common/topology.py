"""A snapshot of who owns what: immutable, checked when it is made, replaced as a whole."""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise

from common.departure import Departure
from common.level import Level
from common.slots import SLOT_COUNT

CLUSTER = ""
"""Stands for the cluster where a shard is named."""


class ShardStatus(StrEnum):
    """What a shard may be used for; the placement issue of each status is decided by the router."""

    ACTIVE = "active"
    READONLY = "readonly"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"


GIVES = frozenset({ShardStatus.ACTIVE, ShardStatus.DRAINING})
"""Slots may go from a shard that is."""
TAKES = frozenset({ShardStatus.ACTIVE})
"""Slots may come to a shard that is."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A read-only service on a standby of a shard's primary: its name, and where it listens (`host:port`)."""

    replica_id: str
    address: str


def server_name(shard_id: str, replica_id: str | None = None) -> str:
    """What operators know a server by: a replica's own id is one of its shard's alone. None: the primary."""
    return shard_id if replica_id is None else f"{shard_id}/{replica_id}"


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: where its service listens (`host:port`), its share of the slots beside the others', its replicas."""

    shard_id: str
    address: str
    weight: int = 1
    status: ShardStatus = ShardStatus.ACTIVE
    replicas: tuple[Replica, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots `first` to `last`, both included, owned by one shard."""

    first: int
    last: int
    shard_id: str


@dataclass(frozen=True, slots=True)
class Cutover:
    """Slots that went from `source` to `target`: whoever has the target's log up to here has all that was ever written
    to them on the source. Of several cutovers between the two, the latest.
    """

    source: str
    target: str
    timeline: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Topology:
    """All slots and their shards under one epoch.

    Raises ValueError when the ranges leave a gap, overlap, or name an unknown shard.
    """

    cluster_id: str
    epoch: int
    shards: tuple[Shard, ...]
    ranges: tuple[SlotRange, ...]
    levels: Mapping[str, Level] = field(default_factory=dict, hash=False)
    """Degradation levels that an operator has set, by shard or CLUSTER; whatever is not named decides for itself."""
    cutovers: tuple[Cutover, ...] = ()
    """What positions in the logs of former owners mean on their successors."""
    _firsts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _by_id: dict[str, Shard] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {shard.shard_id: shard for shard in self.shards}
        expected = 0
        for owned in self.ranges:
            if owned.first != expected or owned.last < owned.first:
                raise ValueError(f"slots {expected} to {owned.first} have no owner or several")
            if owned.shard_id not in by_id:
                raise ValueError(f"slots {owned.first} to {owned.last} belong to the unknown shard {owned.shard_id}")
            expected = owned.last + 1
        if expected != SLOT_COUNT:
            raise ValueError(f"slots from {expected} have no owner")
        object.__setattr__(self, "_by_id", by_id)
        object.__setattr__(self, "_firsts", tuple(owned.first for owned in self.ranges))

    def after(self, departures: Collection[Departure]) -> "Topology":
        """This one with slots gone where shards say that they went. Of two that speak of a slot, the later holds."""
        shards, owners, cutovers, epoch = dict(self._by_id), self._owners(), list(self.cutovers), self.epoch
        for gone in sorted(departures, key=lambda departure: departure.epoch):
            shards.setdefault(gone.shard_id, Shard(gone.shard_id, gone.address))
            owners[gone.first : gone.last + 1] = [gone.shard_id] * (gone.last - gone.first + 1)
            cutovers.append(Cutover(gone.source, gone.shard_id, gone.timeline, gone.lsn))
            epoch = max(epoch, gone.epoch)
        firsts = [slot for slot in range(SLOT_COUNT) if slot == 0 or owners[slot] != owners[slot - 1]]
        ranges = tuple(
            SlotRange(first, following - 1, owners[first]) for first, following in pairwise([*firsts, SLOT_COUNT])
        )
        return replace(self, epoch=epoch, shards=tuple(shards.values()), ranges=ranges, cutovers=tuple(cutovers))

    def owner(self, slot: int) -> Shard:
        """The shard that owns `slot` (0 to 16,383)."""
        return self._by_id[self.ranges[bisect_right(self._firsts, slot) - 1].shard_id]

    def serving(self) -> tuple[Shard, ...]:
        """The shards that own slots, ordered by id: the ones that a fan-out asks."""
        owners = {owned.shard_id for owned in self.ranges}
        return tuple(sorted((s for s in self.shards if s.shard_id in owners), key=lambda s: s.shard_id))

    def ranges_of(self, shard_id: str) -> list[tuple[int, int]]:
        """The (first, last) slots of a shard, ascending."""
        return [(owned.first, owned.last) for owned in self.ranges if owned.shard_id == shard_id]

    def slot_count(self, shard_id: str) -> int:
        """How many slots a shard owns."""
        return sum(last - first + 1 for first, last in self.ranges_of(shard_id))

    def _owners(self) -> list[str]:
        return [owned.shard_id for owned in self.ranges for _ in range(owned.first, owned.last + 1)]
