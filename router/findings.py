"""What the health monitor finds: how each thing is that a router needs, with a figure, and how all of it is. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Condition(IntEnum):
    """From well to bad. The numbers are those of `memshard.admin.v1.Condition`."""

    UNKNOWN = 1
    """Nobody can say."""
    HEALTHY = 2
    DEGRADED = 3
    """It costs time, copies or comfort, and no answers."""
    UNHEALTHY = 4
    """It costs answers."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How one thing is. `subject` is a shard or a replica (`common.topology.server_name`); empty for what the cluster
    has one of."""

    name: str
    subject: str
    condition: Condition
    figure: float | None = None
    """None when there is none to be had."""
    unit: str = ""
    message: str = ""
    """For people. Without what users have stored, and without addresses."""
    at: float = 0.0
    """When, in seconds since 1970."""

    @property
    def key(self) -> tuple[str, str]:
        """What it is about."""
        return self.name, self.subject


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in an order that stays."""

    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> "Report":
        """Of findings in any order."""
        return cls(tuple(sorted(findings, key=lambda finding: finding.key)))

    @property
    def overall(self) -> Condition:
        """The worst, those aside of which nothing is known."""
        return max((finding.condition for finding in self.findings), default=Condition.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Scale:
    """From which figure on something is no longer well. With `falling`, from which figure down."""

    degraded: float
    unhealthy: float | None = None
    falling: bool = False

    def condition(self, figure: float) -> Condition:
        """Of a figure."""
        sign = -1 if self.falling else 1
        if self.unhealthy is not None and sign * figure >= sign * self.unhealthy:
            return Condition.UNHEALTHY
        return Condition.DEGRADED if sign * figure >= sign * self.degraded else Condition.HEALTHY
