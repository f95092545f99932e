"""How both clients connect: the channel's options, and the checks of the arguments they share."""

from __future__ import annotations

import json
import math
from typing import Final

from memshard._values import number
from memshard.errors import invalid

DEFAULT_ADDRESS: Final = "localhost:50051"
DEFAULT_TIMEOUT_S: Final = 10.0
"""Generous for one call of a healthy cluster, which answers in milliseconds, and short enough for an agent's turn."""

_MIB: Final = 1024 * 1024

_SERVICE_CONFIG: Final = {
    "methodConfig": [
        {
            "name": [{"service": "memshard.v1.MemoryService"}],
            # One retry, and for a router that is away alone: it retries towards the shards by itself, and retries at
            # every hop multiply. CANCELLED by nobody here is how gRPC's server ends calls that reach it when it has
            # begun to drain, and that nobody there has seen. A retry is harmless for writes, which carry their id. It
            # comes after as long as the router says (grpc-retry-pushback-ms), and after these pauses when there was no
            # router to say so: the channel, which tries to connect again after 100 ms, must have done that by then.
            # Both are spread by a fifth.
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.25s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # The token bucket: a failure costs 1 of 100 tokens, a success earns 0.1, and below half of them nothing is retried.
    # So the fifty calls that a client may have under way when a primary dies are all tried again, and a long outage is
    # met with few retries, not with twice the load.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}

_OPTIONS: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # gRPC's defaults wait up to two minutes between connection attempts: seconds of outage after a router is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # In spite of its name this is how long a connection attempt may take. A router that is busy at that moment needs
    # longer to answer than a reconnect should wait: with 100 ms here it could not be reached at all.
    ("grpc.min_reconnect_backoff_ms", 2000),
    # The largest answer is a search of 1,000 memories of 64 KiB of text, with their embeddings.
    ("grpc.max_receive_message_length", 128 * _MIB),
    ("grpc.max_send_message_length", 16 * _MIB),
    # Clients with equal options would share one connection per process: closing, or flooding, one would be felt by
    # the others.
    ("grpc.use_local_subchannel_pool", 1),
)


def check_address(address: str) -> str:
    """The address itself, when gRPC can dial it: host:port, or a target such as dns:///router:50051."""
    if not address:
        raise invalid("address", "must not be empty")
    if address.startswith(("http://", "https://")):
        raise invalid("address", f"is host:port without a scheme, not {address!r}")
    return address


def channel_options(address: str) -> tuple[tuple[str, str | int], ...]:
    """The options of a channel to this address."""
    host = address.rpartition("/")[2].rpartition(":")[0]
    if host in {"localhost", "[::1]"} or host.startswith("127."):
        # gRPC would ask the proxy in $http_proxy for this machine's own ports.
        return (*_OPTIONS, ("grpc.enable_http_proxy", 0))
    return _OPTIONS


def check_timeout(timeout_s: float) -> float:
    """The timeout itself, when it is a number of seconds that can pass."""
    seconds = number("timeout_s", timeout_s)
    if not (math.isfinite(seconds) and seconds > 0):
        raise invalid("timeout_s", f"must be more than 0 seconds and finite, not {timeout_s!r}")
    return seconds
