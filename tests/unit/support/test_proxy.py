"""The proxy does to connections what its faults say, and counts the requests of a real gRPC client."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import grpc
import pytest

from tests.support.proxies import Proxies
from tests.support.proxy import Fault, Proxy


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1000):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def echo() -> AsyncIterator[Proxy]:
    """A proxy before a server that answers what it is sent."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with Proxy(*server.sockets[0].getsockname()) as proxy:
        try:
            yield proxy
        finally:
            while Client.open:
                Client.open.pop().writer.close()
    server.close()


class Client:
    """A connection to a proxy, which ends with it."""

    open: ClassVar[list["Client"]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, proxy: Proxy) -> "Client":
        host, _, port = proxy.address.rpartition(":")
        cls.open.append(client := cls(*await asyncio.open_connection(host, int(port))))
        return client

    async def says(self, text: bytes, timeout_s: float = 5.0) -> bytes:
        """The answer to it; empty when there is none in time."""
        self.writer.write(text)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.reader.readexactly(len(text))
        except TimeoutError:
            return b""


async def test_what_was_swallowed_is_gone_and_its_connection_with_it() -> None:
    async with echo() as proxy:
        for fault in (Fault.BLACK_HOLE, Fault.HALF_OPEN):
            old = await Client.to(proxy)
            assert await old.says(b"before") == b"before"
            proxy.inflict(fault)
            new = await Client.to(proxy)
            assert await old.says(b"lost", 0.1) == b""
            assert await new.says(b"lost", 0.1) == b""
            proxy.heal()
            for client in (old, new):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await client.says(b"after")
            again = await Client.to(proxy)
            assert await again.says(b"again") == b"again"


async def test_what_was_frozen_arrives_later() -> None:
    async with echo() as proxy:
        client = await Client.to(proxy)
        proxy.inflict(Fault.FREEZE)
        assert await client.says(b"once", 0.1) == b""
        proxy.heal()
        assert await client.reader.readexactly(4) == b"once"
        assert await client.says(b"more") == b"more"


async def test_resets_end_connections_and_refuse_new_ones() -> None:
    async with echo() as proxy:
        client = await Client.to(proxy)
        assert await client.says(b"before") == b"before"
        proxy.inflict(Fault.RESET)
        for refused in (client, await Client.to(proxy)):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await refused.says(b"during")
        proxy.heal()
        again = await Client.to(proxy)
        assert await again.says(b"again") == b"again"


async def test_latency_is_no_limit_of_throughput_and_a_drip_is() -> None:
    async with echo() as proxy:
        client = await Client.to(proxy)
        proxy.inflict(Fault.LATENCY, 0.2)
        began = time.monotonic()
        assert await client.says(b"x" * 20_000) == b"x" * 20_000
        assert 0.2 <= time.monotonic() - began < 1.0
        proxy.heal()
        proxy.inflict(Fault.DRIP, 1000)
        began = time.monotonic()
        assert await client.says(b"x" * 300) == b"x" * 300
        assert 0.25 <= time.monotonic() - began < 2.0


async def test_garbage_has_the_length_of_the_answer_and_its_connection_is_cut_in_the_end() -> None:
    async with echo() as proxy:
        client = await Client.to(proxy)
        proxy.inflict(Fault.GARBAGE)
        assert await client.says(b"x" * 100) != b"x" * 100
        proxy.heal()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await client.says(b"after")


async def test_requests_are_counted_and_those_with_next_to_nothing_in_them_are_not() -> None:
    async def answer(raw: bytes, _: object) -> bytes:
        return raw

    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("s", {"m": grpc.unary_unary_rpc_method_handler(answer)})]
    )
    await server.start()
    async with Proxies({"it": f"127.0.0.1:{port}"}) as proxies:
        async with grpc.aio.insecure_channel(proxies.addresses["it"]) as channel:
            call: Any = channel.unary_unary("/s/m")
            for size in (20, 100, 70_000, 0, 2, 200_000):
                assert len(await call(b"x" * size)) == size
            await asyncio.gather(*(call(b"12345" * 4) for _ in range(50)), *(call(b"") for _ in range(50)))
        assert await proxies.requests() == {"it": 54}
    await server.stop(None)
