"""Slot arithmetic: which of the 16,384 hash slots a placement key falls into, and how slots are shared out."""

import hashlib
from collections.abc import Iterable, Mapping

SLOT_BITS = 14
SLOT_COUNT = 1 << SLOT_BITS


def slot_of(key: bytes) -> int:
    """The slot of a placement key: the top 14 bits of its 64-bit BLAKE2b (RFC 7693).

    A slot is stored with each row and never changes, so neither may this function.
    """
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - SLOT_BITS)


def share_out(weights: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Contiguous slot ranges (first, last), one for each shard, as near to the weights as whole slots allow.

    Raises ValueError when there is no shard, a weight is below 1, or there are more shards than slots.
    """
    if not weights:
        raise ValueError("there is no shard to give slots to")
    if any(weight < 1 for weight in weights.values()):
        raise ValueError("a shard's weight must be 1 or more")
    if len(weights) > SLOT_COUNT:
        raise ValueError(f"{len(weights)} shards are more than the {SLOT_COUNT} slots")
    total = sum(weights.values())
    ranges: dict[str, tuple[int, int]] = {}
    given, first = 0, 0
    for left, (shard_id, weight) in zip(range(len(weights) - 1, -1, -1), weights.items(), strict=True):
        given += weight
        # Each shard gets at least one slot, and leaves at least one for each that follows.
        end = min(max(round(SLOT_COUNT * given / total), first + 1), SLOT_COUNT - left)
        ranges[shard_id] = (first, end - 1)
        first = end
    return ranges


def as_ranges(slots: Iterable[int]) -> list[tuple[int, int]]:
    """Slots as the fewest ascending (first, last) ranges."""
    ranges: list[tuple[int, int]] = []
    for slot in sorted(set(slots)):
        if ranges and ranges[-1][1] == slot - 1:
            ranges[-1] = (ranges[-1][0], slot)
        else:
            ranges.append((slot, slot))
    return ranges
