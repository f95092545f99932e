"""Request ids where a user's memories are in many slots: taken first in the user's slot, so that none is used twice."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common import logs
from common.deadline import Deadline
from common.errors import InvalidArgument, MemshardError, NotFound, VersionMismatch
from common.slots import slot_of
from memshard.internal.v1 import shard_pb2
from router.dispatch import Dispatch
from router.place import Placement
from router.shards import RELEASE_REQUEST_ID, TAKE_REQUEST_ID

_log = logs.get_logger("request_ids")

# A request that ends like this has had no effect, and its id may be used for another.
_NO_EFFECT = (NotFound, VersionMismatch, InvalidArgument)


class RequestIds:
    """Takes request ids that callers give."""

    def __init__(self, placement: Placement, dispatch: Dispatch) -> None:
        self._placement = placement
        self._dispatch = dispatch

    @asynccontextmanager
    async def taken(
        self, user_id: str, request_id: str, digest: bytes, slot: int, deadline: Deadline
    ) -> AsyncIterator[int]:
        """The slot where this request has its effect: `slot`, or where an earlier attempt meant to have it.

        `request_id` is what the caller gave; an empty one is nobody else's. Where a user has one slot only, the effect
        itself takes the id. Raises InvalidArgument when the id is another request's.
        """
        if not request_id or self._placement.user_slot(user_id) is not None:
            yield slot
            return
        home = slot_of(user_id.encode())
        take = shard_pb2.TakeRequestIdRequest(user_id=user_id, request_id=request_id, digest=digest, memory_slot=slot)
        _, answer = await self._dispatch.to_owner(home, TAKE_REQUEST_ID, take, deadline)
        try:
            yield answer.memory_slot
        except _NO_EFFECT:
            release = shard_pb2.ReleaseRequestIdRequest(user_id=user_id, request_id=request_id, digest=digest)
            try:
                await self._dispatch.to_owner(home, RELEASE_REQUEST_ID, release, deadline)
            except MemshardError as error:
                # The id stays with a request that came to nothing, until it is purged.
                _log.warning("a request id was not given back", reason=error.reason)
            raise
