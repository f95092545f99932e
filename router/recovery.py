"""Recovery: what may help against what is found wrong, tried at most once a minute each, with a log of what was tried.

The decision is pure; `Recovery` carries it out. Breakers and channels recover by themselves from servers that come
back. This is for what does not come back by itself: connections that hang, and a memory that is not to be trusted.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from common import logs
from common.errors import MemshardError
from common.topology import Topology, server_name
from router.findings import Condition, Finding, Report
from router.remembered import Remembered
from router.shards import Shards

_log = logs.get_logger("recovery")

EVERY_S = 60.0
"""Seconds between two attempts of the same action on the same thing: longer than it takes for one to show."""

# Attempts that are remembered: about an hour's, if three things are wrong all the time.
_KEPT = 200
_TIMEOUT_S = 2.0


class Kind(StrEnum):
    """What can be done."""

    RECYCLE_POOL = "recycle_pool"
    """The shard, or the replica, replaces its connections to its database."""
    RECONNECT = "reconnect"
    """The router makes a new connection to the shard or replica."""
    FLUSH_CACHE = "flush_cache"
    """The router forgets where memories are."""


class Outcome(StrEnum):
    """What became of an attempt."""

    DONE = "done"
    FAILED = "failed"
    LIMITED = "limited"
    """Not tried: it was less than EVERY_S ago."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to try, on a shard or a replica; on nothing in particular where there is one of it."""

    kind: Kind
    subject: str
    reason: str
    """The name of the check that asks for it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What was tried, or would have been."""

    action: Action
    at: float
    """In seconds since 1970."""
    outcome: Outcome
    message: str = ""


# What helps against what, and from which condition on. Against a full disk, a busy pool and an embedder nothing here
# does; what is merely slow has a figure, and is left alone.
_REMEDIES = {
    "database": (Condition.UNHEALTHY, (Kind.RECONNECT, Kind.RECYCLE_POOL)),
    "synthetic": (Condition.UNHEALTHY, (Kind.RECONNECT, Kind.RECYCLE_POOL)),
    "replica": (Condition.DEGRADED, (Kind.RECONNECT, Kind.RECYCLE_POOL)),
    "redis": (Condition.DEGRADED, (Kind.FLUSH_CACHE,)),
}
_NONE: tuple[Condition, tuple[Kind, ...]] = (Condition.UNHEALTHY, ())


def remedies(findings: Iterable[Finding]) -> list[Action]:
    """What to try, each once, in the order in which it is to be tried."""
    actions: dict[tuple[Kind, str], Action] = {}
    for finding in findings:
        least, kinds = _REMEDIES.get(finding.name, _NONE)
        if finding.condition < least or finding.figure is not None:
            continue
        for kind in kinds:
            subject = "" if kind is Kind.FLUSH_CACHE else finding.subject
            actions.setdefault((kind, subject), Action(kind, subject, finding.name))
    return list(actions.values())


class RateLimit:
    """Each action on each thing at most once in `every_s` seconds."""

    def __init__(self, clock: Callable[[], float], every_s: float = EVERY_S) -> None:
        self._clock = clock
        self._every_s = every_s
        self._tried_at: dict[tuple[Kind, str], float] = {}

    def admits(self, action: Action) -> bool:
        """Whether it may be tried now; it counts as tried then."""
        now, key = self._clock(), (action.kind, action.subject)
        # Of what was longer ago nothing needs to be known.
        self._tried_at = {k: at for k, at in self._tried_at.items() if now - at < self._every_s}
        if key in self._tried_at:
            return False
        self._tried_at[key] = now
        return True


class Recovery:
    """Tries what may help. `log` has the last attempts, oldest first."""

    def __init__(
        self,
        shards: Shards,
        remembered: Remembered,
        topology: Callable[[], Topology],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log: deque[Attempt] = deque(maxlen=_KEPT)
        self._shards = shards
        self._remembered = remembered
        self._topology = topology
        self._limit = RateLimit(clock)

    async def recover(self, report: Report) -> list[Attempt]:
        """Against all that is found wrong, on each thing one action after the other; what was tried or too soon."""
        by_subject: dict[str, list[Action]] = {}
        for action in remedies(report.findings):
            by_subject.setdefault(action.subject, []).append(action)
        attempts = await asyncio.gather(*map(self._attempt_all, by_subject.values()))
        return [attempt for of_one in attempts for attempt in of_one]

    async def _attempt_all(self, actions: Iterable[Action]) -> list[Attempt]:
        return [await self._attempt(action) for action in actions]

    async def _attempt(self, action: Action) -> Attempt:
        if not self._limit.admits(action):
            return Attempt(action, time.time(), Outcome.LIMITED, f"tried less than {EVERY_S:g} s ago")
        outcome = Outcome.DONE
        try:
            message = await self._carry_out(action)
        except MemshardError as error:
            outcome, message = Outcome.FAILED, error.reason
        attempt = Attempt(action, time.time(), outcome, message)
        self.log.append(attempt)
        _log.warning(
            "recovery",
            action=action.kind.value,
            subject=action.subject,
            reason=action.reason,
            outcome=outcome.value,
            message=message,
        )
        return attempt

    async def _carry_out(self, action: Action) -> str:
        if action.kind is Kind.FLUSH_CACHE:
            return f"{self._remembered.flush()} entries forgotten"
        address = self._addresses().get(action.subject)
        if address is None:
            return "it is no more"
        if action.kind is Kind.RECONNECT:
            return "a new connection is made" if self._shards.reconnect(address) else "there was no connection"
        replaced = await self._shards.recycle_pool(address, action.subject, timeout_s=_TIMEOUT_S)
        return f"{replaced} connections to the database are replaced" if replaced else "they were replaced just now"

    def _addresses(self) -> dict[str, str]:
        shards = self._topology().shards
        return {shard.shard_id: shard.address for shard in shards} | {
            server_name(shard.shard_id, replica.replica_id): replica.address
            for shard in shards
            for replica in shard.replicas
        }
