"""What a router finds wrong reaches whoever is to hear of it, and so does its end: from the monitor to the webhook."""

import os
import signal
from typing import Any

import pytest

from router.alerts import AFTER_S, QUIET_S
from tests.support.eventually import eventually
from tests.support.faulty import faulty_cluster
from tests.support.receiver import Receiver, receiving

# A few looks of the monitor, on a busy machine.
_LOOKS_S = 15


def told(receiver: Receiver, subject: str) -> list[tuple[str, str]]:
    """What was said of one thing, in order: status and alert."""
    return [(body["status"], body["alert"]) for body in receiver.bodies if body["subject"] == subject]


@pytest.mark.timeout(240)
async def test_a_replica_that_is_stopped_is_told_of_and_so_is_its_return() -> None:
    async with receiving() as receiver:
        settings: dict[str, Any] = {"alert_webhook_url": receiver.url}
        # What is stopped stays so until the test has seen it.
        async with faulty_cluster(shards=1, replicas=1, options=["--hung-after", "0"], settings=settings) as faulty:
            (replica,) = faulty.replicas("shard-0")
            subject = f"shard-0/{replica}"
            assert told(receiver, subject) == []
            pid = faulty.cluster.kill(replica, signal.SIGSTOP)
            try:
                await eventually(
                    lambda: told(receiver, subject) == [("firing", "replica")], within_s=AFTER_S + _LOOKS_S
                )
            finally:
                os.kill(pid, signal.SIGCONT)
            ends = [("firing", "replica"), ("resolved", "replica")]
            await eventually(lambda: told(receiver, subject) == ends, within_s=QUIET_S + _LOOKS_S)
            (first, *_) = (body for body in receiver.bodies if body["subject"] == subject)
            assert first["router"] == faulty.address
            assert first["why"] == "does not serve"
