"""How long to wait before a dead process is started again."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_S = 0.1
MAX_S = 5.0
# A process that was healthy for this long did not die of how it was started.
RESET_AFTER_S = 10.0


@dataclass(slots=True)
class Backoff:
    """0.1 s, doubled with each death up to 5 s, and 0.1 s again after 10 s of health."""

    clock: Callable[[], float] = time.monotonic
    _deaths: int = field(default=0, init=False)
    _healthy_since: float | None = field(default=None, init=False)

    def healthy(self) -> None:
        """The process has become healthy."""
        self._healthy_since = self.clock()

    def died(self) -> float:
        """The process has died, or could not be started: seconds to wait before the next start."""
        if self._healthy_since is not None and self.clock() - self._healthy_since >= RESET_AFTER_S:
            self._deaths = 0
        self._healthy_since = None
        delay_s: float = min(FIRST_S * 2**self._deaths, MAX_S)
        if delay_s < MAX_S:
            self._deaths += 1
        return delay_s
