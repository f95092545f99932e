"""The serving end of a stream that carries many calls: each is served as if it had come by itself.

A call over grpc.aio costs the two ends together half a millisecond of processor time, most of it for the call and not
for its bytes. Over a stream, and with all that is ready at the same time in one message, it is a twentieth of that. So
routers speak with shards and replicas in this way; whoever does not can make each call by itself, as before.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from common.deadline import Deadline
from common.errors import MemshardError, ResourceExhausted, Unavailable, Unimplemented
from common.status import to_status
from memshard.internal.v1 import shard_pb2

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[shard_pb2.MultiplexRequest, shard_pb2.MultiplexResponse]

# The bytes of an answer, given those of a request. Raises MemshardError, and nothing else but cancellation.
Answering: TypeAlias = Callable[[bytes, Deadline], Awaitable[bytes]]

MESSAGE_BYTES = 1024 * 1024
"""What is ready at the same time goes into one message up to about this size."""

# Calls of one stream at work: far more than routers and the limits of a shard let there be.
_MOST_AT_WORK = 4096
# Answers that the other end has not taken yet; above, nothing more is taken from it.
_MOST_UNSENT_BYTES = 32 * 1024 * 1024


class Multiplexer:
    """Serves the streams of one service. `leave` has them end once all that was asked is answered."""

    def __init__(self, answers: Mapping[str, Answering], default_deadline_s: float) -> None:
        self._answers = answers
        self._default_deadline_s = default_deadline_s
        self._streams: set[_Stream] = set()
        self._leaving = False

    async def serve(self, _: object, context: "Context") -> None:
        """One stream, from its beginning to its end: a handler of gRPC's."""
        stream = _Stream(self._answers, self._default_deadline_s, context)
        self._streams.add(stream)
        if self._leaving:
            stream.leave()
        try:
            await stream.serve()
        finally:
            self._streams.discard(stream)

    def leave(self) -> None:
        """No call is taken any more."""
        self._leaving = True
        for stream in tuple(self._streams):
            stream.leave()


class _Stream:
    """One stream. It ends when the other end says so, or this one leaves, and all that was asked is answered."""

    def __init__(self, answers: Mapping[str, Answering], default_deadline_s: float, context: "Context") -> None:
        self._answers = answers
        self._default_deadline_s = default_deadline_s
        self._context = context
        self._at_work: dict[int, asyncio.Task[None]] = {}
        self._unsent: list[shard_pb2.Answer] = []
        self._unsent_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._taken = asyncio.Event()
        self._taken.set()
        self._say_closing = False
        self._no_more = False
        self._ended = asyncio.Event()

    async def serve(self) -> None:
        """Takes calls until the end."""
        reading = asyncio.create_task(self._read())
        try:
            await self._ended.wait()
        finally:
            # A caller who has gone cancels its calls, as one whose connection has ended does.
            tasks = [reading, *self._at_work.values(), *([self._writing] if self._writing else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def leave(self) -> None:
        """Takes no more calls, and says so."""
        self._no_more = self._say_closing = True
        self._write_soon()

    async def _read(self) -> None:
        while True:
            message: Any = await self._context.read()
            if message is grpc.aio.EOF:
                break
            for ask in message.asks:
                self._begin(ask)
            for number in message.left:
                if task := self._at_work.get(number):
                    task.cancel()
            await self._taken.wait()
        self._no_more = True
        self._end_if_done()

    def _begin(self, ask: shard_pb2.Ask) -> None:
        answering = self._answers.get(ask.rpc)
        refusal: MemshardError | None = None
        if self._no_more:
            refusal = Unavailable("the server is about to leave", reason="LEAVING", retry_after_s=0.0)
        elif answering is None:
            refusal = Unimplemented("there is no such rpc")
        elif len(self._at_work) >= _MOST_AT_WORK:
            refusal = ResourceExhausted("too many calls on one stream", reason="OVERLOADED", retry_after_s=1.0)
        if refusal is not None or answering is None:
            assert refusal is not None
            self._send(shard_pb2.Answer(number=ask.number, error=to_status(refusal)))
            return
        self._at_work[ask.number] = asyncio.create_task(self._serve(ask, answering))

    async def _serve(self, ask: shard_pb2.Ask, answering: Answering) -> None:
        timeout_s = ask.timeout_us / 1e6 if ask.timeout_us > 0 else self._default_deadline_s
        try:
            response = await answering(ask.request, Deadline.after(timeout_s))
        except MemshardError as error:
            self._send(shard_pb2.Answer(number=ask.number, error=to_status(error)))
        else:
            self._send(shard_pb2.Answer(number=ask.number, response=response))
        finally:
            del self._at_work[ask.number]
            self._end_if_done()

    def _send(self, answer: shard_pb2.Answer) -> None:
        self._unsent.append(answer)
        self._unsent_bytes += len(answer.response)
        if self._unsent_bytes > _MOST_UNSENT_BYTES:
            self._taken.clear()
        self._write_soon()

    def _write_soon(self) -> None:
        """With what else becomes ready until then."""
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while self._unsent or self._say_closing:
            message = shard_pb2.MultiplexResponse(closing=self._say_closing)
            self._say_closing = False
            size = 0
            while self._unsent and size < MESSAGE_BYTES:
                answer = self._unsent.pop(0)
                size += len(answer.response)
                message.answers.append(answer)
            self._unsent_bytes -= size
            if self._unsent_bytes <= _MOST_UNSENT_BYTES:
                self._taken.set()
            await self._context.write(message)
        self._writing = None
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._no_more and not self._at_work and not self._unsent and self._writing is None:
            self._ended.set()
