"""Two services on one shard, as during a rolling update that starts the new one before the old one leaves."""

import asyncio
import signal

from memshard.internal.v1 import shard_pb2
from tests.support.place import Place
from tests.support.replicated import replicated


async def test_two_services_of_one_shard_write_side_by_side_and_the_one_that_leaves_takes_nothing_along() -> None:
    async with replicated("b") as servers:
        old = Place(servers, await servers.start_shard("old", sync_set="external"))
        new = Place(servers, await servers.start_shard("new", sync_set="external"))
        # The same memory by both at once: one store, and one repetition of it.
        twice = old.store_request("twice")
        answers = await asyncio.gather(old.shard.Store(twice), new.shard.Store(twice))
        assert answers[0].memory.id == answers[1].memory.id

        stored = [f"tea {number}" for number in range(40)]
        for number, content in enumerate(stored[:20]):
            await (old if number % 2 else new).store(content)
        leaves = asyncio.create_task(servers.stop("old", signal.SIGTERM))
        for content in stored[20:]:
            await new.store(content)
        await leaves
        request = shard_pb2.ListRequest(route=new.route(), user_id=new.user, page_size=100)
        page = await new.shard.List(request, timeout=10)
        assert sorted(memory.content for memory in page.memories) == sorted([*stored, "twice"])
