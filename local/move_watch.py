"""Looking after fences: slots that a mover has fenced, and left so since it was killed or hangs, take writes again."""

import asyncio
import logging

from common.catalog_moves import is_unattended, read_moves
from common.config import MOVER_HUNG_AFTER_S
from local import mover
from local.cluster import Plan
from local.errors import LocalClusterError
from local.sessions import as_owner

_INTERVAL_S = 2.0
_CATALOG_TIMEOUT_S = 2.0
# Between two attempts that lead to nothing, as when a shard's primary is away.
_RETRY_S = 5.0


class MoveWatch:
    """Asks the catalog all the time, which costs a query every two seconds."""

    def __init__(self, plan: Plan, log: logging.Logger) -> None:
        self._plan = plan
        self._log = log

    async def run(self) -> None:
        """Never returns."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                if not await self._is_abandoned():
                    continue
                self._log.warning("a mover has left slots without an owner that takes writes; it is made up for")
                await mover.last_of(self._plan, ["recover"])
            except LocalClusterError as error:
                self._log.warning("what a mover has left fenced is looked at again: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _is_abandoned(self) -> bool:
        """Whether a move is at a point at which nobody may write, and nobody drives it who does something about it."""
        plan = self._plan
        async with as_owner(plan.catalog_server(), plan.secrets, _CATALOG_TIMEOUT_S) as connection:
            moves = [move for move in await read_moves(connection) if move.may_be_fenced]
            for move in moves:
                if await is_unattended(connection, move, MOVER_HUNG_AFTER_S):
                    return True
        return False
