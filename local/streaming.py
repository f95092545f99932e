"""Rpcs of the admin service that tell each step of long work. The work goes on when the caller leaves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from common import errors, status
from common.bearer import Bearer
from local.appointment import RefusedError
from local.errors import LocalClusterError

if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

Q = TypeVar("Q", bound=Message)
Tell: TypeAlias = Callable[[Message], None]


class Streaming(Generic[Q]):
    """One rpc: `work` is given the request, and tells each step. Half of it is worse than a whole: it is never broken
    off by a caller.
    """

    def __init__(
        self, bearer: Bearer, log: logging.Logger, request: type[Q], work: Callable[[Q, Tell], Awaitable[None]]
    ) -> None:
        self._bearer = bearer
        self._log = log
        self._request = request
        self._work = work
        self._at_work: set[asyncio.Task[None]] = set()

    def handler(self) -> "grpc.RpcMethodHandler[bytes, bytes]":
        """gRPC's handler of the rpc. Requests are parsed here, so that garbage is INVALID_ARGUMENT."""
        return grpc.unary_stream_rpc_method_handler(self._answer)

    async def close(self) -> None:
        """Cancels what is still at work."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def _answer(self, raw: bytes, context: "Context") -> AsyncIterator[bytes]:
        name = self._request.DESCRIPTOR.name
        try:
            self._bearer.require(context)
            async for step in self._steps(self._request.FromString(raw)):
                yield step.SerializeToString()
        except DecodeError:
            await status.abort(context, errors.InvalidArgument(f"not a {name}", reason="MALFORMED_REQUEST"))
        except errors.MemshardError as error:
            await status.abort(context, error)
        except RefusedError as error:
            await status.abort(context, errors.FailedPrecondition(str(error), reason="NOT_POSSIBLE"))
        except LocalClusterError as error:
            reason = f"{name.removesuffix('Request').upper()}_UNFINISHED"
            await status.abort(context, errors.Unavailable(str(error), reason=reason))
        except Exception:
            self._log.exception("%s failed by a bug", name)
            await status.abort(context, errors.Internal("internal error; the supervisor's log says where"))

    async def _steps(self, request: Q) -> AsyncIterator[Message]:
        steps: asyncio.Queue[Message | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._work(request, steps.put_nowait))
        self._at_work.add(work)
        work.add_done_callback(self._at_work.discard)
        work.add_done_callback(lambda _task: steps.put_nowait(None))
        while (step := await steps.get()) is not None:
            yield step
        await work
