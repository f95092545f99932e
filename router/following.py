"""What a request does that met a shard which does not serve its slots: learn where they are, wait, try again.

A slot that is being handed over takes no writes for some tens of milliseconds. The wait is here and not in the shard,
where it would hold places that others need.
"""

from collections.abc import Collection

from common.deadline import Deadline
from common.errors import WrongShard
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

    def __init__(self, watch: TopologyWatch, deadline: Deadline) -> None:
        self._watch = watch
        self._deadline = deadline
        self._until = min(deadline.less(_KEPT_S).at, Deadline.after(_PATIENCE_S).at)
        self._pause_s = _PAUSES_S[0]
        self._turns = 1

    async def again(self, stale: Collection[WrongShard]) -> bool:
        """Whether there is a point in trying again, once this has returned."""
        before = self._watch.topology.epoch
        news = [self._watch.told(error.departures) for error in stale]
        if any(error.fenced for error in stale):
            left_s = Deadline(self._until).remaining_s()
            if left_s <= 0:
                return False
            await self._watch.newer(before, min(self._pause_s, left_s))
            self._pause_s = min(self._pause_s * 2, _PAUSES_S[1])
            return True
        self._turns += 1
        if self._turns > _MOST_TURNS:
            return False
        if not any(news):
            await self._watch.refresh(max(error.epoch for error in stale), self._deadline)
        return True
