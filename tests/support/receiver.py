"""A receiver of alerts: an HTTP server of the test's own, which a webhook's URL leads to."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Receiver:
    """An HTTP server that keeps what is posted to it."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0
    status: int = 200
    silent: bool = False
    drips: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.asked += 1
                if self.silent:
                    await reader.read()
                    break
                while self.drips:
                    # A line of an answer that never ends.
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
                assert head.startswith("post /hook?key=secret http/1.1")
                assert "content-type: application/json" in head
                if self.status == 200:
                    self.bodies.append(body)
                writer.write(f"HTTP/1.1 {self.status} x\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?key=secret"
    async with server:
        yield receiver
