"""Forgetting everywhere: routers tell each other, through Redis, which locations to drop from their memories.

Each router listens on one channel. It believes its memory only while that link is alive: for LEASE_S after it sent the
last ping that was answered on it. Redis keeps the order of what it sends on a connection, so whoever got the answer to
a ping has heard everything that was said before that ping arrived. Hence all routers have forgotten what was announced
when all that listen have confirmed it, or else once LEASE_S have passed: who has not heard it by then does not believe
its memory (leases: Gray & Cheriton, SOSP 1989).
"""

import asyncio
import uuid
from collections.abc import Sequence

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common import logs
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import Unavailable
from router.location import LocationCache

_log = logs.get_logger("invalidation")

# Seconds that a router believes its memory after it last asked whether the link is there.
LEASE_S = 1.5
_PING_INTERVAL_S = 0.4
_RECONNECT_S = 0.5
_TIMEOUT_S = 1.0
_RETRY_AFTER_S = 1.0

# Ids in one message: 37 KB.
_CHUNK = 1000
# Ids of which Redis could not be told yet; more than that are left to their time to live.
_MAX_OWED = 200_000
_CONFIRMATIONS_TTL_S = 60


class Invalidations:
    """One router's end of the channel. `run` listens; `alive` says whether it has heard everything."""

    def __init__(self, settings: RouterSettings, cluster_id: str) -> None:
        self._channel = f"memshard:forget:{cluster_id}"
        self._redis = _connect(settings)
        self._lease_until = 0.0
        self._owed: dict[str, None] = {}

    def alive(self) -> bool:
        """Whether nothing can have been announced that this router has not heard. Never, without Redis."""
        return asyncio.get_running_loop().time() < self._lease_until

    async def run(self, locations: LocationCache) -> None:
        """Listens until cancelled, and makes `locations` forget. After a break it forgets everything. Needs Redis."""
        assert self._redis is not None
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.subscribe(self._channel)
                locations.clear()
                if self._owed:
                    await self._settle(locations, Deadline.after(LEASE_S * 2))
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._listen(pubsub, locations))
                    tasks.create_task(_ping(pubsub))
            except* Exception as errors:
                # Whatever Redis does, and whatever its client makes of it: the link is gone, and with it the memory.
                kinds = sorted({type(error).__name__ for error in errors.exceptions})
                _log.warning("what other routers forget is not heard; remembering nothing", errors=kinds)
            finally:
                self._lease_until = 0.0
                locations.clear()
                await pubsub.aclose()  # type: ignore[no-untyped-call]
            await asyncio.sleep(_RECONNECT_S)

    async def tell(self, memory_ids: Sequence[str]) -> None:
        """Has the other routers forget locations, soon; says nothing when that fails."""
        if self._redis is None:
            return
        try:
            await self._publish(self._redis, memory_ids, "")
        except Exception as error:  # As everywhere with Redis: it may fail no call.
            _log.warning("other routers were not told to forget", error=type(error).__name__)

    async def forget_everywhere(self, locations: LocationCache, memory_ids: Sequence[str], deadline: Deadline) -> None:
        """Returns when no router and no Redis has the locations any more.

        Raises Unavailable / ERASE_UNCONFIRMED when that could not be made sure of. They are not lost: the same again
        asks for them too, and so does the next connection to Redis.
        """
        locations.drop(memory_ids)
        if self._redis is None:
            return
        for memory_id in memory_ids:
            if len(self._owed) < _MAX_OWED:
                self._owed[memory_id] = None
        try:
            await self._settle(locations, deadline)
        except Exception as error:
            _log.warning("an erasure was not confirmed", error=type(error).__name__)
            raise Unavailable(
                "everything is erased from the shards, but the caches could not be reached; the same request again "
                "settles it",
                reason="ERASE_UNCONFIRMED",
                retry_after_s=_RETRY_AFTER_S,
            ) from error

    async def close(self) -> None:
        """Closes the connections."""
        if self._redis is not None:
            await self._redis.aclose()

    async def _settle(self, locations: LocationCache, deadline: Deadline) -> None:
        """Has Redis and all routers forget what is owed. Raises whatever keeps it from that."""
        assert self._redis is not None
        owed = list(self._owed)
        if not owed:
            return
        async with deadline.bound():
            await locations.drop_from_redis(self._redis, owed)
            confirmations = f"memshard:forgotten:{uuid.uuid4()}"
            listeners = await self._publish(self._redis, owed, confirmations)
            try:
                async with asyncio.timeout(LEASE_S):
                    while listeners:
                        if await self._redis.blpop([confirmations], timeout=_TIMEOUT_S) is not None:
                            listeners -= 1
            except TimeoutError:
                """Who has not confirmed by now does not believe its memory."""
        for memory_id in owed:
            self._owed.pop(memory_id, None)

    async def _publish(self, redis: Redis, memory_ids: Sequence[str], confirmations: str) -> int:
        """Announces ids; who hears the last message confirms all, if asked to. Returns how many listen."""
        listeners = 0
        for start in range(0, len(memory_ids), _CHUNK):
            last = start + _CHUNK >= len(memory_ids)
            lines = [confirmations if last else "", *memory_ids[start : start + _CHUNK]]
            listeners = await redis.publish(self._channel, "\n".join(lines))
        return listeners

    async def _listen(self, pubsub: PubSub, locations: LocationCache) -> None:
        loop = asyncio.get_running_loop()
        subscribed = False
        while True:
            message = await pubsub.get_message(timeout=_TIMEOUT_S)
            if message is None:
                if not self.alive():
                    raise TimeoutError
            elif message["type"] == "subscribe":
                if subscribed:
                    # The client has connected again by itself, and what was said in between is lost.
                    raise ConnectionError
                subscribed = True
            elif message["type"] == "pong":
                # The ping says when it was sent, by this process's clock.
                sent_at = float(message["data"])
                self._lease_until = max(self._lease_until, min(sent_at, loop.time()) + LEASE_S)
            elif message["type"] == "message":
                confirmations, *memory_ids = message["data"].decode().split("\n")
                locations.drop(memory_ids)
                if confirmations:
                    await self._confirm(confirmations)

    async def _confirm(self, key: str) -> None:
        assert self._redis is not None
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.rpush(key, "1")
            pipeline.expire(key, _CONFIRMATIONS_TTL_S)
            await pipeline.execute()


async def _ping(pubsub: PubSub) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await pubsub.ping(str(loop.time()))
        await asyncio.sleep(_PING_INTERVAL_S)


def _connect(settings: RouterSettings) -> Redis | None:
    if settings.redis_url is None:
        return None
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=_TIMEOUT_S * 2,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
