"""Who gets through to a server of a shard that has as much to do as it can."""

from contextlib import ExitStack

import pytest

from common.errors import ResourceExhausted
from shard.read_service import admission


@pytest.mark.parametrize("rpc", ["Describe", "RecyclePool"])
async def test_who_asks_how_it_is_and_who_helps_it_get_through_when_all_places_are_taken(rpc: str) -> None:
    limit = admission()
    with ExitStack() as hanging:
        while limit.limiter.has_room():
            hanging.enter_context(limit.of("Search"))
        with pytest.raises(ResourceExhausted):
            await limit.room("Search")
        await limit.room(rpc)
        with limit.of(rpc):
            pass
