"""Hearing what other routers say is to be forgotten; and the lease under which this one believes its memory.

One loop does both, again and again: it registers a lease in Redis, pings on the connection on which it listens, and
hears what comes. It believes its memory for LEASE_S after the moment before both. Redis keeps the order of what it
sends on a connection, so with the answer to the ping it has heard all that was said before that. And whoever has said
something and then looks up the leases finds its own there: of those that have not run out he knows whom to wait for,
and those that have are not believed any more (leases: Gray & Cheriton, SOSP 1989).
"""

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from common import logs
from common.cancellation import raise_if_cancelled
from router.location import era_key
from router.redis_cache import NOW_MS
from router.remembered import Hears

_log = logs.get_logger("listening")

# Seconds that a router believes its memory after it last asked whether the link is there.
LEASE_S = 1.5
_LEASE_MS = round(LEASE_S * 1000)
_PING_INTERVAL_S = 0.4
# Pings without an answer after which the link counts as broken.
_MAX_UNANSWERED = 4
_RECONNECT_S = 0.5
_TIMEOUT_S = 1.0
# Messages heard between two pings: what comes in floods must not use up the lease.
_MAX_HEARD = 500

_CONFIRMATIONS_TTL_S = 60
# Keys of a cluster that is no more.
_KEPT_S = 7 * 86400

# A lease by Redis' clock; since when there are leases; and the era. A Redis that is new, or has lost what it had,
# begins an era that nobody knows yet.
_RENEW = f"""{NOW_MS}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('SET', KEYS[2], now, 'NX')
redis.call('SET', KEYS[3], ARGV[3], 'NX')
for number = 1, 3 do redis.call('EXPIRE', KEYS[number], ARGV[4]) end
return redis.call('GET', KEYS[3])
"""
# Who has a lease; and whether there can be others, whose leases Redis has lost.
_HOLDERS = f"""{NOW_MS}
local since = redis.call('GET', KEYS[2])
local all = since and now - since > tonumber(ARGV[1])
return {{all and 1 or 0, redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf')}}
"""
# Stands for those that Redis does not know.
_SOMEBODY = ""


@dataclass(frozen=True, slots=True)
class Names:
    """What a cluster's routers have in common in Redis."""

    channel: str
    leases: str
    leases_since: str
    era: str

    @classmethod
    def of(cls, cluster_id: str) -> "Names":
        """Those of one cluster, which may share its Redis with others."""
        return cls(
            channel=f"memshard:forget:{cluster_id}",
            leases=f"memshard:routers:{cluster_id}",
            leases_since=f"memshard:routers-since:{cluster_id}",
            era=era_key(cluster_id),
        )


class Listener:
    """One router's end of the channel. `run` listens; `alive` says whether it has heard everything."""

    def __init__(self, redis: Redis, names: Names) -> None:
        self._redis = redis
        self._names = names
        self._id = str(uuid.uuid4())
        self.signature = f"from:{self._id}"
        """Among the ids of a message: this router has said it, and has nothing to hear in it."""
        self._renew = redis.register_script(_RENEW)
        self._holders = redis.register_script(_HOLDERS)
        self._lease_until = 0.0
        self._unanswered = 0

    def alive(self) -> bool:
        """Whether nothing can have been announced that this router has not heard."""
        return asyncio.get_running_loop().time() < self._lease_until

    async def others(self) -> set[str]:
        """The other routers that may believe their memories at this moment; one more if Redis cannot know them all.

        Raises what Redis' client raises.
        """
        keys = [self._names.leases, self._names.leases_since]
        known_all, members = await self._holders(keys=keys, args=[_LEASE_MS])
        found = {member.decode() for member in members} - {self._id}
        return found if known_all else found | {_SOMEBODY}

    async def run(self, remembered: Hears) -> None:
        """Listens until cancelled, and makes `remembered` forget. After a break it forgets everything."""
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.subscribe(self._names.channel)
                if await pubsub.get_message(timeout=_TIMEOUT_S) is None:
                    raise TimeoutError  # noqa: TRY301  # To be handled like one of Redis' client.
                # Whatever began before may not have heard all.
                remembered.clear()
                await self._attend(pubsub, remembered)
            except Exception as error:
                # Whatever Redis does, and whatever its client makes of it: the link is gone, and with it the memory.
                _log.warning("what other routers forget is not heard; remembering nothing", error=type(error).__name__)
            finally:
                self._lease_until = 0.0
                remembered.clear()
                await _close(pubsub)
            raise_if_cancelled()
            await asyncio.sleep(_RECONNECT_S)

    async def _attend(self, pubsub: PubSub, remembered: Hears) -> None:
        loop = asyncio.get_running_loop()
        self._unanswered = 0
        while True:
            began = loop.time()
            remembered.hear_era(await self._register())
            # The ping says when it all began, by this process's clock.
            await pubsub.ping(str(began))
            self._unanswered += 1
            if self._unanswered > _MAX_UNANSWERED:
                raise TimeoutError
            until = began + _PING_INTERVAL_S
            for _ in range(_MAX_HEARD):
                raise_if_cancelled()
                message = await pubsub.get_message(timeout=max(0.0, until - loop.time()))
                if message is not None:
                    await self._hear(message["type"], message["data"], remembered)
                elif loop.time() >= until:
                    break

    async def _register(self) -> bytes:
        """Renews the lease; returns the era."""
        keys = [self._names.leases, self._names.leases_since, self._names.era]
        arguments: list[Any] = [self._id, _LEASE_MS, str(uuid.uuid4()), _KEPT_S]
        era: bytes = await self._renew(keys=keys, args=arguments)
        return era

    async def _hear(self, kind: str, data: bytes, remembered: Hears) -> None:
        if kind == "subscribe":
            # The client has connected again by itself, and what was said in between is lost.
            raise ConnectionError
        if kind == "pong":
            self._unanswered = 0
            began = min(float(data), asyncio.get_running_loop().time())
            self._lease_until = max(self._lease_until, began + LEASE_S)
        elif kind == "message":
            confirmations, era, *memory_ids = data.decode().split("\n")
            if self.signature not in memory_ids:
                remembered.drop(memory_ids)
            if era:
                remembered.hear_era(era.encode())
            if confirmations:
                await self._confirm(confirmations)

    async def _confirm(self, key: str) -> None:
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.rpush(key, self._id)
            pipeline.expire(key, _CONFIRMATIONS_TTL_S)
            await pipeline.execute()


async def _close(pubsub: PubSub) -> None:
    # It is done with, and what keeps it from a tidy end is why.
    with suppress(Exception):
        async with asyncio.timeout(_TIMEOUT_S):
            await pubsub.aclose()  # type: ignore[no-untyped-call]
