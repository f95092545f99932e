"""Which findings somebody should hear of, once and not all the time. Pure, but for its clock.

Every finding that is not well raises an alert when it has lasted; as long as it does, it is told again after five
minutes at the earliest, or when it has become worse; and when it has been well for a while, that is told too. What
fails again after that is told anew, so that the last that was heard of it is how it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from router.findings import Condition, Finding, Report

AFTER_S = 5.0
"""Seconds that something must last before it is told: longer than a restart, or a look that was missed."""
AGAIN_AFTER_S = 300.0
"""Seconds between two tellings of what goes on."""
QUIET_S = 30.0
"""Seconds of being well before that is told: what comes and goes is not over."""


class Status(StrEnum):
    """What is told."""

    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Alert:
    """What is told of one finding: the one that raised it, or with RESOLVED the last that did."""

    status: Status
    finding: Finding


@dataclass(slots=True)
class _Incident:
    """What has become of one thing, until it is told to be over, or was well before there was anything to tell."""

    finding: Finding
    """The last that was not well."""
    bad_since: float | None = None
    good_since: float | None = None
    told_at: float | None = None
    """When it was last told; None: it was not."""
    told: Condition = Condition.HEALTHY
    """The worst that was told."""


class Alerts:
    """Decides what to tell. `observe` every second or so."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._incidents: dict[tuple[str, str], _Incident] = {}

    def observe(self, report: Report) -> list[Alert]:
        """What is to be told now."""
        now = self._clock()
        findings = {finding.key: finding for finding in report.findings}
        told: list[Alert] = []
        for key, finding in findings.items():
            if finding.condition >= Condition.DEGRADED:
                incident = self._incidents.setdefault(key, _Incident(finding))
                incident.finding = finding
                told += self._bad(incident, now)
        for key, incident in list(self._incidents.items()):
            # What is not known any more is not over by that. What is gone is.
            if key not in findings or findings[key].condition is Condition.HEALTHY:
                over = self._good(incident, now)
                told += over
                if over or incident.told_at is None:
                    del self._incidents[key]
        return told

    @staticmethod
    def _bad(incident: _Incident, now: float) -> list[Alert]:
        incident.good_since = None
        if incident.bad_since is None:
            incident.bad_since = now
        if now - incident.bad_since < AFTER_S:
            return []
        due = incident.told_at is None or now - incident.told_at >= AGAIN_AFTER_S
        if not due and incident.finding.condition <= incident.told:
            return []
        incident.told = incident.finding.condition if due else max(incident.told, incident.finding.condition)
        incident.told_at = now
        return [Alert(Status.FIRING, incident.finding)]

    @staticmethod
    def _good(incident: _Incident, now: float) -> list[Alert]:
        incident.bad_since = None
        if incident.good_since is None:
            incident.good_since = now
        if incident.told_at is None or now - incident.good_since < QUIET_S:
            return []
        return [Alert(Status.RESOLVED, incident.finding)]
