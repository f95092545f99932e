"""The asking end of a stream that carries many calls to one server: common/multiplex.py has the other.

A stream begins with the first call, and anew with the next one after it has ended. What is under way when it ends has
no answer, as with a connection that ends.
"""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from common.errors import Internal, MemshardError
from common.multiplex import MESSAGE_BYTES
from common.status import from_status
from memshard.internal.v1 import shard_pb2

if TYPE_CHECKING:
    Call: TypeAlias = grpc.aio.StreamStreamCall[shard_pb2.MultiplexRequest, shard_pb2.MultiplexResponse]

Asked: TypeAlias = "asyncio.Future[bytes]"
"""The bytes of an answer to come. Cancel it to leave."""

_PATH = "/memshard.internal.v1.ShardService/Multiplex"


class LineLostError(Exception):
    """The stream ended before the answer came."""


class LineRefusedError(Exception):
    """The server knows no such stream; nothing of the call has reached it."""


class Line:
    """The stream to one server, as one after the other."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.refused = False
        """Whether the server knows no such streams: an older one, which takes each call by itself."""
        begin: Any = channel.stream_stream(
            _PATH,
            request_serializer=shard_pb2.MultiplexRequest.SerializeToString,
            response_deserializer=shard_pb2.MultiplexResponse.FromString,
        )
        self._begin: Callable[[], Call] = begin
        self._streams: set[_Stream] = set()
        self._stream: _Stream | None = None

    def ask(self, rpc: str, request: bytes, timeout_s: float) -> Asked:
        """Sends one call. What comes of it is its answer, or MemshardError: the server's own; TimeoutError,
        LineLostError, LineRefusedError.
        """
        if self._stream is None or self._stream.closing:
            self._stream = _Stream(self._begin(), self._ended)
            self._streams.add(self._stream)
        return self._stream.ask(rpc, request, timeout_s)

    @property
    def streams(self) -> int:
        """How many there are: the current one, and those on which calls are still under way."""
        return len(self._streams)

    def retire(self) -> None:
        """Ends it once what is under way has its answers."""
        for stream in tuple(self._streams):
            stream.retire()

    async def close(self) -> None:
        """Ends it now."""
        await asyncio.gather(*(stream.close() for stream in tuple(self._streams)))

    def _ended(self, stream: "_Stream", code: grpc.StatusCode | None) -> None:
        self._streams.discard(stream)
        if self._stream is stream:
            self._stream = None
        if code is grpc.StatusCode.UNIMPLEMENTED:
            self.refused = True


class _Stream:
    """One stream, and the calls under way on it."""

    def __init__(self, call: "Call", ended: "Callable[[_Stream, grpc.StatusCode | None], None]") -> None:
        self.closing = False
        """Whether nothing more may be asked."""
        self._call = call
        self._ended = ended
        self._numbers = count(1)
        self._pending: dict[int, Asked] = {}
        self._unsent: dict[int, shard_pb2.Ask] = {}
        self._left: list[int] = []
        self._retired = False
        self._writing: asyncio.Task[None] | None = asyncio.create_task(self._write(first=True))
        self._reading = asyncio.create_task(self._read())

    def ask(self, rpc: str, request: bytes, timeout_s: float) -> Asked:
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        asked: Asked = loop.create_future()
        self._pending[number] = asked
        self._unsent[number] = shard_pb2.Ask(
            number=number, rpc=rpc, request=request, timeout_us=max(1, int(timeout_s * 1e6))
        )
        timer = loop.call_later(timeout_s, _time_is_up, asked)

        def done(_: object) -> None:
            timer.cancel()
            self._done(number, left=asked.cancelled())

        asked.add_done_callback(done)
        self._write_soon()
        return asked

    def retire(self) -> None:
        self.closing = self._retired = True
        self._write_soon()

    async def close(self) -> None:
        self._call.cancel()
        tasks = [self._reading, *([self._writing] if self._writing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lose(None)

    def _done(self, number: int, *, left: bool) -> None:
        """A call has its answer, or nobody waits for it any more."""
        self._pending.pop(number, None)
        if self._unsent.pop(number, None) is None and left:
            self._left.append(number)
        if (self._left or (self._retired and not self._pending)) and not self._reading.done():
            self._write_soon()

    def _write_soon(self) -> None:
        """With what else is asked until then."""
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self, *, first: bool = False) -> None:
        try:
            if first:
                await self._call.write(shard_pb2.MultiplexRequest())
            while self._unsent or self._left:
                message = shard_pb2.MultiplexRequest(left=self._left)
                self._left = []
                size = 0
                while self._unsent and size < MESSAGE_BYTES:
                    ask = self._unsent.pop(next(iter(self._unsent)))
                    size += len(ask.request)
                    message.asks.append(ask)
                await self._call.write(message)
            if self._retired and not self._pending:
                await self._call.done_writing()
            self._writing = None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream has ended, which whoever reads will hear as well, with its cause.
            self.closing = True

    async def _read(self) -> None:
        code: grpc.StatusCode | None = None
        try:
            while True:
                message: Any = await self._call.read()
                if message is grpc.aio.EOF:
                    break
                self._take(message)
            code = await self._call.code()
        except grpc.aio.AioRpcError as error:
            code = error.code()
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            # The channel was closed.
        self._lose(code)

    def _take(self, message: shard_pb2.MultiplexResponse) -> None:
        if message.closing:
            self.closing = True
        for answer in message.answers:
            asked = self._pending.pop(answer.number, None)
            if asked is None or asked.done():
                continue
            if answer.WhichOneof("outcome") == "response":
                asked.set_result(answer.response)
            else:
                asked.set_exception(_error(answer))

    def _lose(self, code: grpc.StatusCode | None) -> None:
        self.closing = True
        self._ended(self, code)
        if self._writing is not None:
            self._writing.cancel()
        self._unsent.clear()
        for asked in tuple(self._pending.values()):
            if not asked.done():
                refused = code is grpc.StatusCode.UNIMPLEMENTED
                asked.set_exception(LineRefusedError() if refused else LineLostError())


def _time_is_up(asked: Asked) -> None:
    if not asked.done():
        asked.set_exception(TimeoutError())


def _error(answer: shard_pb2.Answer) -> MemshardError:
    return from_status(answer.error) or Internal("a server answered with an error of no known kind")
