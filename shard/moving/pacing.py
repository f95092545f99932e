"""How fast moves follow each other: below a rate of rows, and not while the standbys are behind or commits slow."""

import asyncio
import time

from shard.moving.moving import Tell
from shard.moving.side import Side

# A commit this much slower than the quickest one seen, and slow in itself, means that the server has enough to do.
_SLOWER = 8.0
_SLOW_S = 0.1
_POLL_S = 0.5
# Longest that one move is held up.
_PATIENCE_S = 60.0

_LAG = """
SELECT coalesce(max(pg_wal_lsn_diff(pg_current_wal_flush_lsn(), replay_lsn)), 0)::bigint FROM pg_stat_replication
LEFT JOIN pg_replication_slots ON active_pid = pid WHERE coalesce(slot_type = 'physical', true)
"""
_COMMIT = "SELECT pg_logical_emit_message(true, 'memshard', '')"


class Pace:
    """Shared by the moves of one mover."""

    def __init__(self, max_rate: int, max_lag_bytes: int, tell: Tell) -> None:
        self._max_rate = max_rate
        self._max_lag_bytes = max_lag_bytes
        self._tell = tell
        self._free_at = 0.0
        self._quickest_s: dict[str, float] = {}

    async def turn(self) -> None:
        """Waits until the next move may begin, by the rate."""
        await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))

    def moved(self, rows: int) -> None:
        """So many rows went over."""
        if self._max_rate:
            self._free_at = max(self._free_at, time.monotonic()) + rows / self._max_rate

    async def room(self, *sides: Side) -> None:
        """Waits until the servers have room for a move, for a bounded time."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            busy = [side.shard_id for side in sides if await self._is_busy(side)]
            if not busy:
                return
            self._tell({"event": "waiting", "for": busy})
            await asyncio.sleep(_POLL_S)

    async def _is_busy(self, side: Side) -> bool:
        if await side.connection.fetchval(_LAG) > self._max_lag_bytes:
            return True
        began = time.monotonic()
        await side.connection.execute(_COMMIT)
        took_s = time.monotonic() - began
        quickest_s = self._quickest_s[side.shard_id] = min(took_s, self._quickest_s.get(side.shard_id, took_s))
        return took_s > max(_SLOW_S, quickest_s * _SLOWER)
