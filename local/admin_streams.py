"""Rpcs of ClusterService that tell how far they are: parsed, authorised, and their errors mapped in one place."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from common import errors, status
from common.bearer import Bearer
from local.appointment import RefusedError
from local.errors import LocalClusterError

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

T = TypeVar("T")

Stream: TypeAlias = Callable[[Any], AsyncGenerator[Message, None]]


def handlers(
    streams: Mapping[str, tuple[type[Message], Stream]],
    bearer: Bearer,
    log: logging.Logger,
    *,
    unfinished: str,
) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
    """gRPC's handlers of rpcs by name, each with the type of its request. Requests are parsed here, so that garbage is
    INVALID_ARGUMENT.

    What fails half way is UNAVAILABLE with the reason `unfinished`.
    """

    def method(name: str, kind: type[Message], stream: Stream) -> "grpc.RpcMethodHandler[Any, Any]":
        async def serve(raw: bytes, context: "Context") -> AsyncIterator[bytes]:
            try:
                bearer.require(context)
                # Closed at once when the caller leaves, and not whenever the garbage is collected.
                async with aclosing(stream(kind.FromString(raw))) as messages:
                    async for message in messages:
                        yield message.SerializeToString()
            except DecodeError:
                await status.abort(
                    context, errors.InvalidArgument(f"not a {kind.DESCRIPTOR.name}", reason="MALFORMED_REQUEST")
                )
            except errors.MemshardError as error:
                await status.abort(context, error)
            except RefusedError as error:
                await status.abort(context, errors.FailedPrecondition(str(error), reason="NOT_POSSIBLE"))
            except LocalClusterError as error:
                await status.abort(context, errors.Unavailable(str(error), reason=unfinished))
            except Exception:
                log.exception("%s failed by a bug", name)
                await status.abort(context, errors.Internal("internal error; the supervisor's log says where"))

        return grpc.unary_stream_rpc_method_handler(serve)

    return {name: method(name, kind, stream) for name, (kind, stream) in streams.items()}


class Lasting:
    """Work that goes on when whoever asked for it leaves: half of it is worse than all or nothing."""

    def __init__(self) -> None:
        self._at_work: set[asyncio.Task[None]] = set()

    async def follow(self, work: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """What the work tells, as it does; it is done to its end whether or not somebody follows."""
        told: asyncio.Queue[T | None] = asyncio.Queue()

        async def do() -> None:
            async for one in work:
                told.put_nowait(one)

        task = asyncio.create_task(do())
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)
        task.add_done_callback(lambda _task: told.put_nowait(None))
        while (one := await told.get()) is not None:
            yield one
        await task

    async def close(self) -> None:
        """Cancels what is still at work."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)
