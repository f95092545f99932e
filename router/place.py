"""Placement: which slot a memory or a user belongs to. The one strategy so far is `user_based`."""

from common.slots import slot_of


def user_slot(user_id: str) -> int:
    """The slot of everything that a user has: a hash of the user's bytes, so that no two spellings share a meaning."""
    return slot_of(user_id.encode())
