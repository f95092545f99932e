"""Many calls over one stream, between real servers and clients of gRPC: each is as if it had come by itself."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    MemshardError,
    Unavailable,
    Unimplemented,
)
from common.rpc import ServiceHandler, generic_handler
from common.topology import Shard
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router.line import Line, LineLostError, LineRefusedError
from router.shards import GET, LIST, SEARCH, Shards
from tests.support.eventually import eventually

_SERVICE = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]


class _Server:
    """Answers Get with the id that was asked for, when it is let; and knows who left."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.asked: list[str] = []
        self.left: list[str] = []
        self.remaining_s: list[float] = []
        self.content = ""
        self.handler: ServiceHandler = generic_handler(_SERVICE, self, default_deadline_s=60)
        self.calls = _Calls(self.handler)
        self.server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self, handler: grpc.GenericRpcHandler | None = None) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self.server.add_generic_rpc_handlers([handler or self.calls])
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def Get(self, request: shard_pb2.GetRequest, deadline: Deadline) -> shard_pb2.GetResponse:  # noqa: N802
        self.asked.append(request.id)
        self.remaining_s.append(deadline.remaining_s())
        try:
            if request.id != "quick":
                await self.open.wait()
        except asyncio.CancelledError:
            self.left.append(request.id)
            raise
        if request.id == "taken":
            raise AlreadyExists("it is taken")
        if request.id == "bug":
            raise KeyError(request.id)
        return shard_pb2.GetResponse(
            found=[shard_pb2.FoundMemory(memory=pb.Memory(id=request.id, content=self.content))]
        )

    async def Search(  # noqa: N802
        self, request: shard_pb2.SearchRequest, deadline: Deadline
    ) -> shard_pb2.SearchResponse:
        return shard_pb2.SearchResponse()

    async def List(self, request: shard_pb2.ListRequest, deadline: Deadline) -> shard_pb2.ListResponse:  # noqa: N802
        return shard_pb2.ListResponse()


class _Calls(grpc.GenericRpcHandler):
    """Counts calls of gRPC by their rpc."""

    def __init__(self, inner: grpc.GenericRpcHandler) -> None:
        self.inner = inner
        self.counts: dict[str, int] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = str(details.method).rpartition("/")[2]
        self.counts[name] = self.counts.get(name, 0) + 1
        return self.inner.service(details)


class _Older(grpc.GenericRpcHandler):
    """A server from before there were such streams."""

    def __init__(self, inner: grpc.GenericRpcHandler) -> None:
        self.inner = inner

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return None if str(details.method).endswith("/Multiplex") else self.inner.service(details)


@asynccontextmanager
async def _serving() -> AsyncIterator[tuple[_Server, Line]]:
    server = _Server()
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        line = Line(channel)
        try:
            yield server, line
        finally:
            await line.close()
            server.open.set()
            assert server.server is not None
            await server.server.stop(None)


def _get(memory_id: str) -> bytes:
    raw: bytes = shard_pb2.GetRequest(id=memory_id).SerializeToString()
    return raw


async def _got(line: Line, memory_id: str, timeout_s: float = 5.0) -> str:
    raw = await line.ask("Get", _get(memory_id), timeout_s)
    (found,) = shard_pb2.GetResponse.FromString(raw).found
    return found.memory.id


async def test_many_calls_share_a_stream_and_each_has_its_own_answer() -> None:
    async with _serving() as (server, line):
        ids = [str(number) for number in range(500)]
        assert await asyncio.gather(*(_got(line, memory_id) for memory_id in ids)) == ids
        assert sorted(server.asked) == sorted(ids)
        assert server.calls.counts == {"Multiplex": 1}


async def test_one_that_is_done_later_holds_nobody_up() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        slow = line.ask("Get", _get("slow"), 5.0)
        await eventually(lambda: server.asked == ["slow"], within_s=5)
        assert await _got(line, "quick") == "quick"
        assert not slow.done()
        server.open.set()
        await slow


@pytest.mark.parametrize(
    ("rpc", "request_bytes", "error"),
    [
        ("Get", _get("taken"), AlreadyExists),
        ("Get", _get("bug"), Internal),
        ("Get", b"\xff\xff", InvalidArgument),
        ("Delete", b"", Unimplemented),
        ("Multiplex", b"", Unimplemented),
        ("NoSuchRpc", b"", Unimplemented),
    ],
)
async def test_what_goes_wrong_with_one_call_is_its_own(
    rpc: str, request_bytes: bytes, error: type[MemshardError]
) -> None:
    async with _serving() as (_, line):
        failing = line.ask(rpc, request_bytes, 5.0)
        others = asyncio.gather(*(_got(line, str(number)) for number in range(20)))
        with pytest.raises(error):
            await failing
        assert len(await others) == 20


async def test_whoever_leaves_is_left_alone_on_the_other_side_too() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        staying, leaving = (line.ask("Get", _get(name), 5.0) for name in ("staying", "leaving"))
        await eventually(lambda: len(server.asked) == 2, within_s=5)
        leaving.cancel()
        await eventually(lambda: server.left == ["leaving"], within_s=5)
        server.open.set()
        await staying


async def test_whoever_leaves_before_it_was_sent_was_never_there() -> None:
    async with _serving() as (server, line):
        line.ask("Get", _get("leaving"), 5.0).cancel()
        assert await _got(line, "staying") == "staying"
        assert server.asked == ["staying"]


async def test_time_is_up_on_both_sides() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await _got(line, "late", timeout_s=0.3)
        assert 0.25 < time.monotonic() - began < 2
        assert 0.1 < server.remaining_s[0] <= 0.3
        # The server's own deadline ends its work.
        await eventually(lambda: server.left == ["late"], within_s=5)


async def test_a_server_that_dies_leaves_all_without_an_answer_and_its_successor_has_a_new_stream() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        asked = [line.ask("Get", _get(str(number)), 5.0) for number in range(3)]
        await eventually(lambda: len(server.asked) == 3, within_s=5)
        assert server.server is not None
        await server.server.stop(None)
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [LineLostError] * 3
        with pytest.raises(LineLostError):
            await line.ask("Get", _get("nobody is there"), 5.0)
        server.open.set()
        await server.start()

        async def answers() -> bool:
            try:
                return await _got(line, "again") == "again"
            except LineLostError:
                return False

        await eventually(answers, within_s=10)


async def test_an_end_of_the_caller_is_the_end_of_its_calls() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        asked = line.ask("Get", _get("left behind"), 60.0)
        await eventually(lambda: server.asked == ["left behind"], within_s=5)
        await line.close()
        with pytest.raises(LineLostError):
            await asked
        await eventually(lambda: server.left == ["left behind"], within_s=5)


async def test_a_server_that_leaves_answers_what_it_was_asked_and_takes_no_more() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        asked = line.ask("Get", _get("before"), 5.0)
        await eventually(lambda: server.asked == ["before"], within_s=5)
        server.handler.leave()
        assert server.server is not None
        stopping = asyncio.create_task(server.server.stop(10))
        # What is asked now has a stream of its own, which nobody takes any more.
        await eventually(lambda: line._stream is not None and line._stream.closing, within_s=5)
        with pytest.raises((LineLostError, MemshardError)):
            await line.ask("Get", _get("after"), 5.0)
        assert not stopping.done()
        server.open.set()
        assert shard_pb2.GetResponse.FromString(await asked).found[0].memory.id == "before"
        async with asyncio.timeout(3):
            await stopping
        assert server.asked == ["before"]


async def test_what_reaches_a_server_that_leaves_is_told_so_and_has_no_effect() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        asked = line.ask("Get", _get("before"), 5.0)
        await eventually(lambda: server.asked == ["before"], within_s=5)
        stream = line._stream
        assert stream is not None
        # As when both are on their way at the same moment.
        server.handler.leave()
        with pytest.raises(Unavailable) as refused:
            await stream.ask("Get", _get("crossed"), 5.0)
        assert refused.value.reason == "LEAVING"
        assert refused.value.retryable
        server.open.set()
        await asked
        assert server.asked == ["before"]


async def test_a_line_that_is_retired_ends_after_the_last_answer() -> None:
    async with _serving() as (server, line):
        server.open.clear()
        asked = line.ask("Get", _get("last"), 5.0)
        await eventually(lambda: server.asked == ["last"], within_s=5)
        line.retire()
        server.open.set()
        await asked
        await eventually(lambda: not line.streams, within_s=5)


async def test_large_answers_come_in_several_messages() -> None:
    async with _serving() as (server, line):
        server.content = "x" * 700_000
        assert len(await asyncio.gather(*(_got(line, str(number)) for number in range(30)))) == 30


async def test_a_server_without_such_streams_is_told_from_one_that_is_gone() -> None:
    async with _serving() as (server, line):
        assert server.server is not None
        await server.server.stop(None)
        await server.start(_Older(server.handler))

        async def refuses() -> bool:
            try:
                await line.ask("Get", _get("new ways"), 5.0)
            except LineRefusedError:
                return True
            except LineLostError:
                return False  # It is not back yet, as far as the channel knows.
            raise AssertionError("an answer")

        await eventually(refuses, within_s=10)
        assert line.refused
        assert server.asked == []


@asynccontextmanager
async def _shards(*, older: bool = False) -> AsyncIterator[tuple[_Server, Shards, Shard]]:
    server, shards = _Server(), Shards(RouterSettings(catalog_dsn="postgresql://unused"))  # type: ignore[arg-type]
    await server.start(_Older(server.calls) if older else None)
    try:
        yield server, shards, Shard("shard-0", f"127.0.0.1:{server.port}")
    finally:
        server.open.set()
        await shards.close()
        assert server.server is not None
        await server.server.stop(None)


async def test_an_older_server_is_asked_call_by_call() -> None:
    async with _shards(older=True) as (server, shards, shard):
        for number in range(3):
            answer = await shards.call(shard, GET, shard_pb2.GetRequest(id=str(number)), Deadline.after(5))
            assert answer.found[0].memory.id == str(number)
        assert server.asked == ["0", "1", "2"]
        assert server.calls.counts == {"Get": 3}


async def test_what_may_be_large_has_a_call_of_its_own() -> None:
    async with _shards() as (server, shards, shard):
        await shards.call(shard, SEARCH, shard_pb2.SearchRequest(k=100), Deadline.after(5))
        assert server.calls.counts == {"Multiplex": 1}
        await shards.call(shard, SEARCH, shard_pb2.SearchRequest(k=101), Deadline.after(5))
        await shards.call(shard, LIST, shard_pb2.ListRequest(), Deadline.after(5))
        assert server.calls.counts == {"Multiplex": 1, "Search": 1, "List": 1}


async def test_calls_over_a_stream_are_in_flight_and_can_be_abandoned() -> None:
    async with _shards() as (server, shards, shard):
        server.open.clear()
        calls = [
            asyncio.create_task(shards.call(shard, GET, shard_pb2.GetRequest(id=str(number)), Deadline.after(5)))
            for number in range(3)
        ]
        await eventually(lambda: len(server.asked) == 3, within_s=5)
        assert shards.outstanding(shard.address) == 3
        shards.abandon(shard.address)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(outcome, "reason", outcome) for outcome in outcomes] == ["SHARD_UNAVAILABLE"] * 3
        await eventually(lambda: len(server.left) == 3, within_s=5)


async def test_a_frozen_server_costs_no_more_than_the_time_there_is() -> None:
    async with _shards() as (server, shards, shard):
        server.open.clear()
        with pytest.raises(DeadlineExceeded, match="shard-0 did not answer in time"):
            await shards.call(shard, GET, shard_pb2.GetRequest(id="x"), Deadline.after(0.3))
