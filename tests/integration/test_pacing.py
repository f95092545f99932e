"""Moves leave servers alone that have enough to do: what a commit takes tells, compared with what it took before."""

import asyncio
from typing import Any

from local.postgres import SUPERUSER
from shard.moving import side
from shard.moving.pacing import Pace
from tests.support.eventually import eventually
from tests.support.proxy import Fault
from tests.support.replicated import SHARD, replicated

_MAX_LAG_BYTES = 64 * 2**20
_LATENCY_S = 0.4
_WAITING = {"event": "waiting", "for": [SHARD]}


async def test_a_move_waits_for_as_long_as_commits_take_much_longer_than_they_did() -> None:
    """They wait for a standby whose link becomes slow. One that always was keeps nobody waiting."""
    async with replicated("b") as servers:
        # It makes the tables, and would change what commits wait for.
        await servers.start_shard()
        await servers.stop("shard")
        await servers.primary.set_sync_names("FIRST 1 (b)")
        link = servers.standby.link
        assert link is not None
        told: list[dict[str, Any]] = []
        pace = Pace(0, _MAX_LAG_BYTES, told.append)
        async with side.opened(SHARD, servers.shard_dsn(SUPERUSER, ["a"]), 1) as one:
            await pace.room(one)
            assert told == []
            # The quickest of some is how long they take: a single one may have waited for the machine.
            for _ in range(10):
                await pace.room(one)
            told.clear()
            link.inflict(Fault.LATENCY, _LATENCY_S)
            waiting = asyncio.ensure_future(pace.room(one))
            await eventually(lambda: len(told) > 2)
            assert not waiting.done()
            link.heal()
            await asyncio.wait_for(waiting, 10)
            assert told == [_WAITING] * len(told)
            told.clear()
            used_to_it = Pace(0, _MAX_LAG_BYTES, told.append)
            link.inflict(Fault.LATENCY, _LATENCY_S)
            await used_to_it.room(one)
            await used_to_it.room(one)
            assert told == []
