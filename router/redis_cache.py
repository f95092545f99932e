"""The way to Redis as a cache: short patience, a breaker, and no failure of anybody's call."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from common import logs
from common.breaker_log import logged
from common.breaker_settings import CACHE
from common.config import RouterSettings
from common.errors import Unavailable

_log = logs.get_logger("redis")

_MAX_CONNECTIONS = 64

# Seconds. A turn of the event loop that takes longer is one with a lot to do; usual ones take a tenth of it.
_LATE_S = 0.01

# For scripts: `now`, by Redis' clock.
NOW_MS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

SILENCE = object()
"""Instead of a reply."""


class RedisCache:
    """Redis, or none when there is no URL. All caches of a router share it, and with it one breaker."""

    def __init__(self, settings: RouterSettings) -> None:
        self.redis = _connect(settings)
        self.timeout_s = settings.redis_timeout_s
        self.breaker = logged("Redis", CACHE)

    async def ask(self, command: Callable[[Redis], Awaitable[object]]) -> object:
        """Redis' reply, None to what it refuses, or SILENCE when there is no Redis, or it failed, or its breaker is
        open."""
        if self.redis is None or self.breaker.refused_for_s():
            return SILENCE
        permit = self.breaker.admit()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s):
                reply = await command(self.redis)
        except ResponseError:
            # It answers, and refuses: there is something else than an entry under the key.
            permit.success(time.monotonic() - began)
            return None
        except Exception as error:
            # A cache may fail a call in no way whatever, not even by an answer that its client chokes on.
            if not (isinstance(error, TimeoutError) and await _is_late()):
                permit.failure()
            _log.warning("going on without Redis", error=type(error).__name__)
            return SILENCE
        else:
            took_s = time.monotonic() - began
            if took_s < self.breaker.settings.slow_call_s or not await _is_late():
                permit.success(took_s)
            return reply
        finally:
            permit.ignore()

    async def ping(self) -> None:
        """Asks Redis whether it is there, whatever its breaker says, which hears of it. Raises Unavailable."""
        if self.redis is None:
            return
        began = time.monotonic()
        try:
            answered = await self.redis.ping()
        except Exception as error:  # Whatever its client raises, it is no answer to a ping.
            raise Unavailable("Redis does not answer", reason="REDIS_UNAVAILABLE") from error
        if answered is not True:
            raise Unavailable("Redis answers something else", reason="REDIS_UNAVAILABLE")
        took_s = time.monotonic() - began
        # Enough of them close it, though nobody may be asking it anything at the moment.
        self.breaker.probe_succeeded()
        for _ in range(self.breaker.settings.probes):
            if not self.breaker.refused_for_s():
                self.breaker.admit().success(took_s)

    async def close(self) -> None:
        """Closes the connections."""
        if self.redis is not None:
            await self.redis.aclose()


async def _is_late() -> bool:
    """Whether the event loop is so busy that what came late was waiting for it, and not for Redis: to stop asking Redis
    then would be to ask every shard instead, at the very moment when there is too much to do.
    """
    began = time.monotonic()
    await asyncio.sleep(0)
    return time.monotonic() - began > _LATE_S


def _connect(settings: RouterSettings) -> Redis | None:
    if settings.redis_url is None:
        return None
    pool = BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=_MAX_CONNECTIONS,
        timeout=settings.redis_timeout_s,
        socket_timeout=settings.redis_timeout_s,
        socket_connect_timeout=settings.redis_timeout_s,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)  # Which closes the pool with the client.
