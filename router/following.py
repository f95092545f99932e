"""What a request does that met a shard which does not serve its slots: learn where they are, wait, try again.

A slot that is being handed over takes no writes for some tens of milliseconds. The wait is here and not in the shard,
where it would hold places that others need. Asking the shard meanwhile whether it is over takes leave of the router's
retry budget; who gets none goes on waiting, for a newer topology or for leave, and nobody is asked.
"""

from collections.abc import Collection

from common.deadline import Deadline
from common.errors import WrongShard
from common.retry import RetryBudget
from router.topology_watch import TopologyWatch

# Longer than a slot may be fenced (`fence_timeout_s` of the mover), so that whoever waits sees the end of it.
_PATIENCE_S = 8.0
# What is kept of the caller's time, in which to say that it was in vain.
_KEPT_S = 0.25
_PAUSES_S = (0.01, 0.05)
# Times that a request goes where it is sent when nothing is being handed over. Once is the rule.
_MOST_TURNS = 3


class Following:
    """One request on its way to the owner of its slots."""

    def __init__(self, watch: TopologyWatch, deadline: Deadline, budget: RetryBudget) -> None:
        self._watch = watch
        self._budget = budget
        self._deadline = deadline
        self._until = min(deadline.less(_KEPT_S).at, Deadline.after(_PATIENCE_S).at)
        self._pause_s = _PAUSES_S[0]
        self._turns = 1

    async def again(self, stale: Collection[WrongShard]) -> bool:
        """Whether there is a point in trying again, once this has returned."""
        before = self._watch.topology.epoch
        news = [self._watch.told(error.departures) for error in stale]
        if any(error.fenced for error in stale):
            return await self._fence_over(before)
        self._turns += 1
        if self._turns > _MOST_TURNS:
            return False
        if not any(news):
            await self._watch.refresh(max(error.epoch for error in stale), self._deadline)
        return True

    async def _fence_over(self, epoch: int) -> bool:
        """Whether the fence may be over: once there is a topology newer than `epoch`, or after a pause, with leave to
        ask. Not, when the time is up.
        """
        while (left_s := Deadline(self._until).remaining_s()) > 0:
            await self._watch.newer(epoch, min(self._pause_s, left_s))
            self._pause_s = min(self._pause_s * 2, _PAUSES_S[1])
            if self._watch.topology.epoch > epoch or self._budget.withdraw():
                return True
        return False
