"""A TCP proxy of the test's own: passes bytes on, or does to them what networks and dying machines do.

`Fault` lists what it can do. Everything passes again after `heal`; a connection that has lost bytes meanwhile is cut
then, as nothing that comes over it could be right any more.
"""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 65536
# Chunks on their way in one direction. More, and whoever sends has to wait.
_MOST_ON_THE_WAY = 1024
_DRIP_S = 0.02
# Sockets that are closed with this answer with RST, and what was still to be sent is gone.
_NO_LINGER = struct.pack("ii", 1, 0)
# HTTP/2 (RFC 9113): the client's preface, a frame's header, and the type of DATA.
_PREFACE_BYTES = 24
_FRAME_HEADER_BYTES = 9
_DATA = 0
# A message in gRPC has five bytes before it: up to this many have next to nothing in them, like a look at health.
_LONGEST_LOOK_BYTES = 16


class Fault(StrEnum):
    """What becomes of bytes, and of connections."""

    LATENCY = "latency"
    """Answers come late by `amount` seconds, in order and without a limit of how many a second."""
    RESET = "reset"
    """Every connection ends with RST, and new ones as soon as they are made."""
    BLACK_HOLE = "black_hole"
    """Connections are accepted, and what comes over them is swallowed, in both directions."""
    FREEZE = "freeze"
    """Nothing comes through, and all of it does after `heal`, as when packets are sent again after a while."""
    HALF_OPEN = "half_open"
    """Requests go through, and the answers are swallowed."""
    DRIP = "drip"
    """Answers trickle: `amount` bytes a second."""
    GARBAGE = "garbage"
    """Instead of the answers, as many random bytes."""


@dataclass
class _Way:
    """What happens to bytes that go in one direction."""

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    swallows: bool = False
    garbles: bool = False
    passing: asyncio.Event = field(default_factory=asyncio.Event)
    healed: asyncio.Event = field(default_factory=asyncio.Event)

    def clear(self) -> None:
        """Everything passes."""
        self.latency_s = self.bytes_per_s = 0.0
        self.swallows = self.garbles = False
        self.passing.set()
        self.healed.set()

    def swallow(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self.swallows = True
        self.healed.clear()


class Proxy:
    """`async with Proxy(host, port) as proxy:` listens on `proxy.address` and forwards to host:port."""

    def __init__(self, host: str, port: int) -> None:
        self.requests = 0
        """gRPC requests that reached the target, but for those without any field, which are looks at its health."""
        self._target = (host, port)
        self._refusing = False
        self._forth, self._back = _Way(), _Way()
        self._connections: set[asyncio.StreamWriter] = set()
        self._broken: set[asyncio.StreamWriter] = set()
        self._lost: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._heal_ways()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def lead_to(self, host: str, port: int) -> None:
        """Forwards new connections there. Those that are open stay where they are, as those of a Service do."""
        self._target = (host, port)

    def inflict(self, fault: Fault, amount: float = 0.0) -> None:
        """From now on, and until `heal`."""
        match fault:
            case Fault.LATENCY:
                self._back.latency_s = amount
            case Fault.RESET:
                self.refuse()
            case Fault.BLACK_HOLE:
                self._forth.swallow()
                self._back.swallow()
            case Fault.FREEZE:
                self._forth.passing.clear()
                self._back.passing.clear()
            case Fault.HALF_OPEN:
                self._back.swallow()
            case Fault.DRIP:
                self._back.bytes_per_s = amount
            case Fault.GARBAGE:
                self._back.garbles = True

    def heal(self) -> None:
        """Ends every fault."""
        self._refusing = False
        self._heal_ways()
        for writer in self._broken & self._connections:
            _reset(writer)
        self._broken.clear()

    def hold_answers(self) -> None:
        """From now on requests go through, and nothing comes back."""
        self._back.passing.clear()

    def lose(self) -> None:
        """Nothing comes over the connections that are open now any more, and nobody is told, as when the machine at
        their other end was switched off. New ones pass.
        """
        self._lost |= self._connections

    def cut(self) -> None:
        """Closes every connection, with what was held back in it; later ones pass again."""
        for writer in self._connections:
            _reset(writer)
        self._connections.clear()
        self._broken.clear()
        self._heal_ways()

    def refuse(self) -> None:
        """Closes every connection, and lets none in until `accept`."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Lets connections in again."""
        self._refusing = False

    def _heal_ways(self) -> None:
        self._forth.clear()
        self._back.clear()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connected(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        self._connections.add(writer)
        ends = [writer]
        try:
            if self._forth.swallows:
                self._broken.add(writer)
                await self._forth.healed.wait()
                return
            back, forth = await asyncio.open_connection(*self._target)
            ends.append(forth)
            self._connections.add(forth)
            if not self._refusing:
                await self._pass_both_ways(reader, writer, back, forth)
        except OSError:
            pass  # The target is not there: the connection is closed, as it would have been without a proxy.
        finally:
            self._connections.difference_update(ends)
            self._broken.discard(writer)
            self._lost.difference_update(ends)
            for end in ends:
                end.close()

    async def _pass_both_ways(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        forth: asyncio.StreamWriter,
    ) -> None:
        """Until one side has ended."""
        ways = [
            asyncio.create_task(self._pass(self._counted(reader), forth, self._forth, writer)),
            asyncio.create_task(self._pass(_chunks(back), writer, self._back, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(
        self, source: AsyncIterator[bytes], target: asyncio.StreamWriter, way: _Way, connection: asyncio.StreamWriter
    ) -> None:
        """Passes bytes on in one direction until their end, which comes in its turn."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_ON_THE_WAY)

        async def read() -> None:
            with suppress(OSError):
                async for data in source:
                    await queue.put((loop.time() + way.latency_s, data))
            await queue.put((loop.time() + way.latency_s, b""))

        reading = asyncio.create_task(read())
        try:
            with suppress(OSError):
                while True:
                    due, data = await queue.get()
                    if (early_s := due - loop.time()) > 0:
                        await asyncio.sleep(early_s)
                    await way.passing.wait()
                    if connection in self._lost:
                        await loop.create_future()
                    if way.swallows:
                        self._broken.add(connection)
                        if not data:  # That there is an end is not seen either.
                            await way.healed.wait()
                    elif data:
                        await self._write(target, os.urandom(len(data)) if way.garbles else data, way, connection)
                    if not data:
                        break
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _write(
        self, target: asyncio.StreamWriter, data: bytes, way: _Way, connection: asyncio.StreamWriter
    ) -> None:
        while data and way.bytes_per_s and not way.swallows:
            size = max(1, int(way.bytes_per_s * _DRIP_S))
            drop, data = data[:size], data[size:]
            target.write(drop)
            await target.drain()
            await asyncio.sleep(len(drop) / way.bytes_per_s)
        if way.garbles:
            self._broken.add(connection)
        target.write(data)
        await target.drain()

    async def _counted(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        counter = RequestCounter()
        async for data in _chunks(reader):
            if not self._forth.swallows:
                self.requests += counter.feed(data)
            yield data


class RequestCounter:
    """Counts the gRPC requests in what a client sends over one HTTP/2 connection.

    A request is a stream whose first DATA frame holds more than a look at health does, which asks for next to nothing.
    """

    def __init__(self) -> None:
        # Bytes that are to be passed over before the next frame's header.
        self._skip = _PREFACE_BYTES
        self._header = b""
        self._newest = 0

    def feed(self, data: bytes) -> int:
        """How many requests began in the next bytes."""
        found = at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            part = data[at : at + _FRAME_HEADER_BYTES - len(self._header)]
            self._header += part
            at += len(part)
            if len(self._header) == _FRAME_HEADER_BYTES:
                length, kind = int.from_bytes(self._header[:3]), self._header[3]
                stream = int.from_bytes(self._header[5:]) & 0x7FFF_FFFF
                self._header, self._skip = b"", length
                # A client numbers its streams upwards, and 5 bytes are no message yet when more of it follows.
                if kind == _DATA and stream > self._newest and length > 0:
                    self._newest = stream
                    found += length > _LONGEST_LOOK_BYTES
        return found


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(_CHUNK_BYTES):
        yield data


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()
