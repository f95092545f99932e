"""Placement: which slot a memory goes to, and what of it can be worked out again from user and id. Pure.

| strategy | a memory's slot comes from | so a user is in | and a memory is found by |
|---|---|---|---|
| user_based | the user | one slot | the user |
| temporal | the month in its UUIDv7 (any other id: the id) | many | its id |
| content_hash | its content when it was stored | many | a claim |
| memory_type | its type when it was stored | many | a claim |
"""

import hashlib
import uuid
from datetime import UTC, datetime

from common.catalog import PlacementStrategy
from common.slots import slot_of
from memshard.v1 import memory_pb2 as pb

_UUID7 = 7
_YEAR_10000_MS = 253_402_300_800_000


class Placement:
    """The arithmetic of the cluster's strategy."""

    def __init__(self, strategy: PlacementStrategy) -> None:
        self._strategy = strategy

    @property
    def claims(self) -> bool:
        """Whether ids have to be claimed, since nothing else tells that one is taken, or where its memory is."""
        return self._strategy in (PlacementStrategy.CONTENT_HASH, PlacementStrategy.MEMORY_TYPE)

    def new_slot(self, memory: pb.Memory) -> int:
        """Where a memory that is to be stored goes. Stored with it, and never worked out again."""
        match self._strategy:
            case PlacementStrategy.USER_BASED:
                return slot_of(memory.user_id.encode())
            case PlacementStrategy.TEMPORAL:
                return slot_of(_month(memory.id).encode())
            case PlacementStrategy.CONTENT_HASH:
                return slot_of(hashlib.sha256(memory.content.encode()).digest())
            case PlacementStrategy.MEMORY_TYPE:
                return slot_of(pb.MemoryType.Name(memory.type).encode())

    def user_slot(self, user_id: str) -> int | None:
        """The one slot of everything that a user has; None when it is spread over all of them."""
        return slot_of(user_id.encode()) if self._strategy is PlacementStrategy.USER_BASED else None

    def memory_slot(self, user_id: str, memory_id: str) -> int | None:
        """The slot of a memory; None when only its claim tells."""
        match self._strategy:
            case PlacementStrategy.USER_BASED:
                return slot_of(user_id.encode())
            case PlacementStrategy.TEMPORAL:
                return slot_of(_month(memory_id).encode())
            case _:
                return None


def home_slot(user_id: str, memory_id: str) -> int:
    """Where the claim of an id is: a hash of user and id together."""
    return slot_of(f"{len(user_id)} {user_id} {memory_id}".encode())


def _month(memory_id: str) -> str:
    """The month of a UUIDv7 (RFC 9562 §5.7: 48 bits of Unix milliseconds first), like 2026-11; else the id itself."""
    made = uuid.UUID(memory_id)
    milliseconds = made.int >> 80
    if made.version != _UUID7 or milliseconds >= _YEAR_10000_MS:
        return memory_id
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m")
