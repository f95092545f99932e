"""Forgetting everywhere: routers tell each other, through Redis, what to drop from their memories: that of which ids.

An erasure begins a new *era* in Redis, so that what was learnt before it is not written there any more
(`router.location`), deletes the entries, announces the ids, and waits until every router that may believe its memory
has confirmed them, or does not believe it any more (`router.listening`).
"""

import asyncio
import uuid
from collections.abc import Sequence
from itertools import islice
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common import logs
from common.cancellation import raise_if_cancelled
from common.config import RouterSettings
from common.deadline import Deadline
from common.errors import Unavailable
from router.listening import LEASE_S, Listener, Names
from router.remembered import Forgets, Hears

_log = logs.get_logger("invalidation")

_TIMEOUT_S = 1.0
# Kept back of an erasure's time for saying that it could not be confirmed.
_MARGIN_S = 0.1

# Ids in one message: 37 KB.
_CHUNK = 1000
# What waits for being told. More than that is changed only while Redis does not keep up.
_MOST_UNTOLD = 20_000
_GATHER_S = 0.005
# Seconds until they are told again.
_AGAIN_S = 0.5


class Invalidations:
    """What this router tells the others, and hears from them."""

    def __init__(self, settings: RouterSettings, cluster_id: str) -> None:
        self._names = Names.of(cluster_id)
        self._timeout_s = settings.redis_timeout_s
        self._redis = _connect(settings)
        self._listener = Listener(self._redis, self._names) if self._redis is not None else None
        # In the order in which they came; a set that has one.
        self._untold: dict[str, None] = {}
        self._anything_untold = asyncio.Event()

    def alive(self) -> bool:
        """Whether nothing can have been announced that this router has not heard. Never, without Redis."""
        return self._listener is not None and self._listener.alive()

    async def run(self, remembered: Hears) -> None:
        """Listens until cancelled, and makes `remembered` forget. After a break it forgets everything. Needs Redis."""
        assert self._listener is not None
        await self._listener.run(remembered)

    def tell_soon(self, said: Sequence[str]) -> None:
        """Has the other routers forget this (`router.remembered` has what can be said); returns at once.

        Whoever does not hear the others at the moment may hear them again, and believe what he remembers: he has to be
        told once he does. What is too much is lost all the same: who must not miss a change goes by positions
        (`router.stamps`), and who is to be erased is forgotten otherwise.
        """
        if self._redis is None:
            return
        self._untold.update(dict.fromkeys(said))
        for one in list(islice(self._untold, max(0, len(self._untold) - _MOST_UNTOLD))):
            del self._untold[one]
        self._anything_untold.set()

    async def keep_telling(self) -> None:
        """Tells what is to be told soon, until cancelled: what comes while one message is under way shares the next."""
        while True:
            await self._anything_untold.wait()
            self._anything_untold.clear()
            # Every write is told, so what comes within a few milliseconds shares a message.
            await asyncio.sleep(_GATHER_S)
            while self._untold:
                told = list(islice(self._untold, _CHUNK - 1))
                for one in told:
                    del self._untold[one]
                is_said = await self._say(told)
                raise_if_cancelled()
                if not is_said:
                    self._untold = dict.fromkeys(told) | self._untold
                    await asyncio.sleep(_AGAIN_S)

    async def _say(self, said: Sequence[str]) -> bool:
        """Whether Redis has taken a message to the other routers."""
        assert self._redis is not None
        assert self._listener is not None
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._publish(self._redis, [self._listener.signature, *said])
        except Exception as error:  # As everywhere with Redis: it may fail no call.
            _log.warning("other routers are still to be told to forget", error=type(error).__name__)
            return False
        return True

    async def tell(self, memory_ids: Sequence[str]) -> None:
        """Has the routers forget these ids; does nothing when Redis is not there, and waits for nobody to confirm."""
        if self._redis is None or not self.alive():
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._publish(self._redis, memory_ids)
        except Exception as error:  # As everywhere with Redis: it may fail no call.
            _log.warning("other routers were not told to forget", error=type(error).__name__)

    async def forget_everywhere(self, remembered: Forgets, memory_ids: Sequence[str], deadline: Deadline) -> None:
        """Returns when no router and no Redis has anything of these any more, nor will from what anybody knew before.

        Raises Unavailable / ERASE_UNCONFIRMED when that could not be made sure of.
        """
        remembered.drop(memory_ids)
        if self._redis is None or self._listener is None:
            return
        try:
            await self._forget(self._redis, self._listener, remembered, memory_ids, deadline.less(_MARGIN_S))
        except Exception as error:
            _log.warning("an erasure was not confirmed", error=type(error).__name__)
            raise Unavailable(
                "everything is erased from the shards, but the caches could not be reached; the same request again "
                "settles it",
                reason="ERASE_UNCONFIRMED",
            ) from error

    async def close(self) -> None:
        """Closes the connections."""
        if self._redis is not None:
            await self._redis.aclose()

    async def _forget(
        self, redis: Redis, listener: Listener, remembered: Forgets, memory_ids: Sequence[str], deadline: Deadline
    ) -> None:
        async with deadline.bound():
            era = str(uuid.uuid4())
            await redis.set(self._names.era, era)
            await remembered.drop_from_redis(redis, memory_ids)
            # Once more: of what this router has read there meanwhile.
            remembered.drop(memory_ids)
            await self._announce(redis, listener, memory_ids, era)
        if deadline.remaining_s() <= 0:
            # Redis' client can have swallowed it.
            raise TimeoutError

    async def _announce(self, redis: Redis, listener: Listener, memory_ids: Sequence[str], era: str) -> None:
        """Returns when every router that could believe otherwise has dropped the ids."""
        confirmations = f"memshard:forgotten:{uuid.uuid4()}"
        await self._publish(redis, memory_ids, confirmations, era)
        # Not those that PUBLISH counts: a router whose connection Redis has dropped may still believe, for its lease.
        waited_for = await listener.others()
        loop = asyncio.get_running_loop()
        until = loop.time() + LEASE_S
        while waited_for and loop.time() < until:
            raise_if_cancelled()
            left_s = max(0.01, until - loop.time())  # Zero would be for ever.
            reply: Any = await redis.blpop([confirmations], timeout=min(_TIMEOUT_S, left_s))
            if reply is not None:
                waited_for.discard(reply[1].decode())

    async def _publish(self, redis: Redis, memory_ids: Sequence[str], confirmations: str = "", era: str = "") -> None:
        """Announces ids; who hears the last message confirms all, if asked to."""
        for start in range(0, len(memory_ids), _CHUNK):
            raise_if_cancelled()
            last = start + _CHUNK >= len(memory_ids)
            lines = [confirmations if last else "", era, *memory_ids[start : start + _CHUNK]]
            await redis.publish(self._names.channel, "\n".join(lines))


def _connect(settings: RouterSettings) -> Redis | None:
    if settings.redis_url is None:
        return None
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=_TIMEOUT_S * 2,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
