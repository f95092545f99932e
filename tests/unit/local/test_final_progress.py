import pytest

from common.sync_set import Progress
from local.replication import StandbyView

EARLY, LATE = Progress(1, 100), Progress(1, 200)


def _view(
    progress: Progress = EARLY, *, receives: bool = False, has_asked: bool = False, waits_for_log: bool = False
) -> StandbyView:
    return StandbyView(True, progress, receives, has_asked, waits_for_log, "", ())


@pytest.mark.parametrize(
    ("before", "view", "expected"),
    [
        # Its receiver is gone; what it received is on disk, replayed or not.
        (None, _view(has_asked=True), True),
        # It has not heard of its primary's end.
        (None, _view(receives=True, has_asked=True), False),
        (_view(waits_for_log=True), _view(receives=True, waits_for_log=True), False),
        # It was started again, and is at its own log: how far it has replayed is not how far it is.
        (None, _view(), False),
        (_view(), _view(), False),
        # It is through, and there is nobody whom it could ask for more.
        (None, _view(waits_for_log=True), False),
        (_view(), _view(waits_for_log=True), False),
        (_view(EARLY, waits_for_log=True), _view(LATE, waits_for_log=True), False),
        (_view(LATE, waits_for_log=True), _view(LATE, waits_for_log=True), True),
    ],
)
def test_when_what_a_standby_says_of_its_log_is_all_that_it_has(
    before: StandbyView | None, view: StandbyView, expected: bool
) -> None:
    assert view.is_final(before) is expected
