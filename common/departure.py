"""What a shard says of slots that it gave away, to a router that still asks it: where they are now.

It travels in the metadata of WRONG_SHARD, so that a router finds the new owner without the catalog.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

# Trailers have 8 KiB, and a departure takes about a hundred bytes. Who has missed more asks again.
MAX_TOLD = 24


@dataclass(frozen=True, slots=True)
class Departure:
    """Slots `first` to `last`, both included, that went from `source` to `shard_id` at `address` with an epoch; and the
    place in the new owner's log at which it has all that was written to them before.
    """

    first: int
    last: int
    source: str
    shard_id: str
    address: str
    epoch: int
    timeline: int
    lsn: int


def to_text(departures: Sequence[Departure]) -> str:
    """As it travels."""
    return json.dumps([astuple(departure) for departure in departures[:MAX_TOLD]], separators=(",", ":"))


def from_text(text: str) -> tuple[Departure, ...]:
    """What was told; nothing when it is garbled: then the router goes on without, as it must be able to."""
    try:
        told = json.loads(text)
        return tuple(Departure(*(kind(v) for kind, v in zip(_KINDS, one, strict=True))) for one in told)
    except (ValueError, TypeError):
        return ()


_KINDS = (int, int, str, str, str, int, int, int)
