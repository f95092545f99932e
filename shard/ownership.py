"""Owning slots: what every write holds on to until it has committed."""

from common.postgres import Connection

# FOR SHARE conflicts with the update that fences a slot, and so waits for it, or makes it wait. (KEY SHARE would not.)
_HOLD = "SELECT 1 FROM owned_slots WHERE slot = $1 AND state = 'own' FOR SHARE"


class NotOwnedError(Exception):
    """The slot is not this shard's to write, any more or yet."""


async def hold(connection: Connection, slot: int) -> None:
    """Keeps `slot` from being fenced until the transaction ends. Raises NotOwnedError.

    For transactions of several statements: each of them sees what was committed before it began, so that what follows
    this one is right. Writes of one statement do it inside (`shard.store`).
    """
    if await connection.fetchval(_HOLD, slot) is None:
        raise NotOwnedError
