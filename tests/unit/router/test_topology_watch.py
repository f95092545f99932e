"""A catalog that lets a router in, and then says no more, is found out like one that is away."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from common.topology import Shard, SlotRange, Topology
from router import topology_watch
from router.topology_watch import TopologyWatch
from tests.support.eventually import eventually

_TOPOLOGY = Topology("cluster", 5, (Shard("a", "127.0.0.1:1"),), (SlotRange(0, 16383, "a"),))


def _message(kind: bytes, body: bytes) -> bytes:
    """A message of PostgreSQL's protocol: its kind, its length, its body."""
    return kind + struct.pack("!i", len(body) + 4) + body


_LET_IN = (
    _message(b"R", struct.pack("!i", 0))
    + _message(b"S", b"server_version\x0018.0\0")
    + _message(b"S", b"client_encoding\0UTF8\0")
    + _message(b"Z", b"I")
)


@dataclass
class Silent:
    """A server that lets everybody in, and answers nothing that is asked after that."""

    port: int = 0
    let_in: int = 0
    asked: bytes = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            (size,) = struct.unpack("!i", await reader.readexactly(4))
            await reader.readexactly(size - 4)
            writer.write(_LET_IN)
            self.let_in += 1
            while some := await reader.read(1000):
                self.asked += some
        writer.close()


@asynccontextmanager
async def silent_server() -> AsyncIterator[Silent]:
    silent = Silent()
    async with await asyncio.start_server(silent.serve, "127.0.0.1", 0) as server:
        silent.port = server.sockets[0].getsockname()[1]
        yield silent


async def test_a_catalog_that_hangs_at_the_first_question_is_left_and_tried_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topology_watch, "_BEGIN_TIMEOUT_S", 0.2)
    async with silent_server() as silent:
        dsn = f"postgresql://nobody@127.0.0.1:{silent.port}/none?sslmode=disable"
        watch = TopologyWatch(dsn, _TOPOLOGY, poll_s=60, changed=lambda _: None)
        running = asyncio.create_task(watch.run())
        try:
            await eventually(lambda: silent.let_in > 1)
            assert b"LISTEN" in silent.asked
            # Whoever wants a look is not held up by it.
            await eventually(lambda: watch.breaker.refused_for_s() > 0, within_s=20)
            assert watch.topology is _TOPOLOGY
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
