"""Whether a process answers: one question with a bound each, asked of the process itself."""

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import asyncpg
import grpc.aio
import psutil
import redis.asyncio
import redis.exceptions
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.postgres import CONNECT_ERRORS
from local.ports import HOST
from memshard.internal.v1 import shard_pb2, shard_pb2_grpc

PROBE_TIMEOUT_S = 2.0

_ASK_ROLE = """
SELECT pg_is_in_recovery() AS is_standby,
       EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming') AS streams
"""

_CHANNEL_OPTIONS = (
    # No backoff left from an earlier probe, and no way through a proxy to our own machine.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


async def serves(port: int, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether the gRPC server on `port` says that it is SERVING."""
    try:
        async with asyncio.timeout(timeout_s):
            # Only when somebody listens: a channel to nobody waits before it tries again.
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            await writer.wait_closed()
            async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=_CHANNEL_OPTIONS) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)  # Its type stubs leave out what it offers.
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except (OSError, TimeoutError, grpc.aio.AioRpcError):
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def hangs(port: int, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether a gRPC server takes connections on `port` and answers nothing. Where nobody listens, nobody hangs."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            await writer.wait_closed()
            async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=_CHANNEL_OPTIONS) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except TimeoutError:
        return True
    except OSError:
        return False
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return False


async def redis_hangs(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether a Redis takes connections and answers nothing."""
    client = redis.asyncio.Redis.from_url(url)
    try:
        async with asyncio.timeout(timeout_s):
            await client.ping()
    except TimeoutError:
        return True
    except (OSError, redis.exceptions.RedisError):
        return False
    finally:
        await client.aclose()
    return False


class Answer(Enum):
    """What PostgreSQL says to SELECT 1."""

    UP = auto()
    RECOVERING = auto()
    """It replays its log after a crash, which takes as long as it takes. (Or it is about to shut down.)"""
    DOWN = auto()


async def ask_postgres(dsn: str, timeout_s: float = PROBE_TIMEOUT_S) -> Answer:
    """Asks PostgreSQL for SELECT 1."""
    try:
        async with asyncio.timeout(timeout_s):
            connection = await asyncpg.connect(dsn)
            try:
                return Answer.UP if await connection.fetchval("SELECT 1") == 1 else Answer.DOWN
            finally:
                connection.terminate()
    except asyncpg.CannotConnectNowError:
        return Answer.RECOVERING
    except CONNECT_ERRORS:
        return Answer.DOWN


@dataclass(frozen=True, slots=True)
class ServerRole:
    """What a PostgreSQL server says of its part in a shard."""

    is_standby: bool
    streams: bool
    """Whether a standby receives its primary's log at this moment."""


async def ask_role(dsn: str, timeout_s: float = PROBE_TIMEOUT_S) -> ServerRole | None:
    """Asks PostgreSQL what it is; None when it does not answer."""
    try:
        async with asyncio.timeout(timeout_s):
            connection = await asyncpg.connect(dsn)
            try:
                row = await connection.fetchrow(_ASK_ROLE)
            finally:
                connection.terminate()
    except CONNECT_ERRORS:
        return None
    return ServerRole(row["is_standby"], row["streams"]) if row else None


async def describe(port: int, timeout_s: float = PROBE_TIMEOUT_S) -> shard_pb2.DescribeResponse | None:
    """Asks a shard or a replica about itself; None when it does not answer."""
    try:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=_CHANNEL_OPTIONS) as channel:
            stub: Any = shard_pb2_grpc.ShardServiceStub(channel)
            answer: shard_pb2.DescribeResponse = await stub.Describe(shard_pb2.DescribeRequest(), timeout=timeout_s)
            return answer
    except grpc.aio.AioRpcError:
        return None


async def answers_ping(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Whether Redis answers PING."""
    client = redis.asyncio.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            return bool(await client.ping())
    except (OSError, TimeoutError, redis.exceptions.RedisError):
        return False
    finally:
        await client.aclose()


def lives(pid: int | None, created_at: float | None) -> bool:
    """Whether the process still lives, and is the one that was made then."""
    if pid is None or created_at is None:
        return False
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created_at) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
