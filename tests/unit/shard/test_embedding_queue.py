"""Embedding later goes on, whatever happens to it: the shard's service would end with it."""

import asyncio
from typing import cast

import pytest

from common.catalog import PlacementStrategy, Precision
from common.embedder import LocalEmbedder
from common.local_model import local_model_name
from shard import embedding_queue
from shard.database import Database
from shard.embedding_queue import EmbeddingQueue
from shard.identity import Identity
from tests.support.eventually import eventually

_KNOWN = Identity(
    "cluster", "shard-0", local_model_name(64), 64, Precision.HALF, PlacementStrategy.USER_BASED, "english"
)


class Buggy:
    """What is no database."""

    def __init__(self) -> None:
        self.asked = 0

    def reading(self, _: object) -> None:
        self.asked += 1
        raise ZeroDivisionError


async def test_a_bug_puts_embedding_off_and_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_queue, "_BACKOFF_S", (0.01, 0.02))
    database = Buggy()
    queue = EmbeddingQueue(cast("Database", database), _KNOWN, LocalEmbedder(64), interval_s=60)
    running = asyncio.create_task(queue.run())
    try:
        await eventually(lambda: database.asked >= 3)
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
