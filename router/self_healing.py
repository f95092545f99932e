"""Recovery without being asked: what has been wrong for a while is acted upon, and no sooner."""

import asyncio
from collections.abc import Callable

from common import logs
from router.findings import Report
from router.recovery import Recovery, remedies

_log = logs.get_logger("recovery")

_EVERY_S = 1.0
# Longer than a failover takes and a restart, which end by themselves.
PATIENCE_S = 15.0


class Patience:
    """Which findings have asked for something for long enough. Pure, but for its clock."""

    def __init__(self, clock: Callable[[], float], patience_s: float = PATIENCE_S) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._since: dict[tuple[str, str], float] = {}

    def exhausted(self, report: Report) -> Report:
        """Those of the findings that something can be done about and that have been so without a break."""
        now = self._clock()
        wrong = {finding.key: finding for finding in report.findings if remedies([finding])}
        self._since = {key: self._since.get(key, now) for key in wrong}
        return Report.of(f for key, f in wrong.items() if now - self._since[key] >= self._patience_s)


async def run(report: Callable[[], Report], recovery: Recovery) -> None:
    """Until cancelled. The recovery's own limit keeps what does not help from being tried all the time."""
    patience = Patience(asyncio.get_running_loop().time)
    while True:
        await asyncio.sleep(_EVERY_S)
        exhausted = patience.exhausted(report())
        if exhausted.findings:
            try:
                await recovery.recover(exhausted)
            except Exception as bug:
                # A router that cannot help serves all the same.
                _log.error("recovery failed by a bug", **logs.describe_bug(bug))
