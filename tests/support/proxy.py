"""A TCP proxy of the test's own: passes bytes on, or holds back the answers and then cuts the connections."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self


class Proxy:
    """`async with Proxy(host, port) as proxy:` listens on `proxy.address` and forwards to host:port."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._refusing = False
        self._answers = asyncio.Event()
        self._answers.set()
        self._connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def hold_answers(self) -> None:
        """From now on requests go through, and nothing comes back."""
        self._answers.clear()

    def cut(self) -> None:
        """Closes every connection, with what was held back in it; later ones pass again."""
        for writer in self._connections:
            writer.transport.abort()
        self._connections.clear()
        self._answers.set()

    def refuse(self) -> None:
        """Closes every connection, and lets none in until `accept`."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Lets connections in again."""
        self._refusing = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            back, forth = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        if self._refusing:
            for end in (writer, forth):
                end.transport.abort()
            return
        self._connections |= {writer, forth}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, forth))
                group.create_task(self._pass_back(back, writer))
        finally:
            self._connections -= {writer, forth}
            for end in (writer, forth):
                end.transport.abort()

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.transport.abort()

    async def _pass_back(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._answers.wait()
                target.write(data)
                await target.drain()
        # That there is an end is held back as well.
        await self._answers.wait()
        target.transport.abort()
