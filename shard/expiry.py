"""Expiry times that are past when they are given.

Found in the shard and not by the router: the repetition of a request that was in time is the same success at any time.
"""

import time

from common.errors import InvalidArgument
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb


def is_past(expiring: pb.Memory | shard_pb2.ClaimItem) -> bool:
    """Whether it has an expiry, and that is past."""
    return expiring.HasField("expire_time") and expiring.expire_time.ToMicroseconds() <= time.time() * 1e6


def too_late() -> InvalidArgument:
    """The error for what would be expired as soon as it was there."""
    return InvalidArgument.field("memory.expire_time", "EXPIRE_TIME_IN_PAST", "is in the past")
