"""Request ids where a user's memories are in many slots: taken first in the user's slot, so that none is used twice."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common import logs
from common.deadline import Deadline
from common.errors import DeadlineExceeded, Internal, MemshardError, OutcomeUnknown
from common.rpc import INTERRUPTED
from common.slots import slot_of
from memshard.internal.v1 import shard_pb2
from router.dispatch import Dispatch
from router.place import Placement
from router.shards import RELEASE_REQUEST_ID, TAKE_REQUEST_ID
from router.tokens import Commits

_log = logs.get_logger("request_ids")

# A request that ends like this may have had its effect. Ended by any other error it has had none.
_IN_DOUBT = (OutcomeUnknown, DeadlineExceeded, Internal)


class RequestIds:
    """Takes request ids that callers give."""

    def __init__(self, placement: Placement, dispatch: Dispatch) -> None:
        self._placement = placement
        self._dispatch = dispatch

    @asynccontextmanager
    async def taken(
        self, user_id: str, request_id: str, digest: bytes, slot: int, deadline: Deadline
    ) -> AsyncIterator[tuple[int, Commits]]:
        """The slot where this request has its effect: `slot`, or where an earlier attempt meant to have it.

        And the commit that took the id, if it took one: it belongs to the receipt.

        `request_id` is what the caller gave; an empty one is nobody else's. Where a user has one slot only, the effect
        itself takes the id. Raises InvalidArgument when the id is another request's.
        """
        if not request_id or self._placement.user_slot(user_id) is not None:
            yield slot, ()
            return
        home = slot_of(user_id.encode())
        take = shard_pb2.TakeRequestIdRequest(user_id=user_id, request_id=request_id, digest=digest, memory_slot=slot)
        shard, answer = await self._dispatch.to_owner(home, TAKE_REQUEST_ID, take, deadline)
        try:
            yield answer.memory_slot, ((shard.shard_id, answer.commit),)
        except MemshardError as error:
            if not isinstance(error, _IN_DOUBT) and error.reason != INTERRUPTED:
                await self._give_back(home, user_id, request_id, digest, deadline)
            raise

    async def _give_back(self, home: int, user_id: str, request_id: str, digest: bytes, deadline: Deadline) -> None:
        """May it be used for another request. The shard keeps it if it knows of another attempt of this one."""
        release = shard_pb2.ReleaseRequestIdRequest(user_id=user_id, request_id=request_id, digest=digest)
        try:
            await self._dispatch.to_owner(home, RELEASE_REQUEST_ID, release, deadline)
        except MemshardError as error:
            # The id stays with a request that came to nothing, until it is purged.
            _log.warning("a request id was not given back", reason=error.reason)
