"""The reserved users that the health monitor stores, reads and deletes as, one in each shard.

Their ids are refused from outside, and reads of all users pass over them, so that nobody ever sees a probe.
"""

PREFIX = "memshard-probe:"
"""What the ids of reserved users begin with."""


def probe_user(shard_id: str) -> str:
    """The user of the probes of one shard."""
    return f"{PREFIX}{shard_id}"
