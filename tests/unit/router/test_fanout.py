"""What was gathered from the shards: the report of who failed, and when that is an error."""

from collections.abc import Mapping

import pytest

from common.errors import DeadlineExceeded, MemshardError, Unavailable
from common.topology import Shard
from memshard.internal.v1 import shard_pb2
from router.fanout import Gathered


def _gathered(*answered: str, failed: Mapping[str, MemshardError] | None = None) -> Gathered[shard_pb2.SearchResponse]:
    return Gathered(
        tuple((Shard(name, "127.0.0.1:1"), shard_pb2.SearchResponse()) for name in answered),
        tuple((Shard(name, "127.0.0.1:1"), error) for name, error in (failed or {}).items()),
    )


_DOWN = {"b": Unavailable("b does not answer", reason="SHARD_UNAVAILABLE"), "c": DeadlineExceeded("too late")}


def test_report_counts_the_shards_and_says_why_some_failed() -> None:
    summary = _gathered("a", failed=_DOWN).origin.summary
    assert (summary.total, summary.succeeded) == (3, 1)
    assert [(failure.shard_id, failure.status.code, failure.status.message) for failure in summary.failed] == [
        ("b", 14, "b does not answer"),
        ("c", 4, "too late"),
    ]


def test_all_answers_are_enough_for_anybody() -> None:
    gathered = _gathered("a", "b")
    gathered.require_all()
    gathered.require_any()
    assert (gathered.origin.summary.total, gathered.origin.summary.succeeded) == (2, 2)


def test_partial_answer_is_an_error_only_to_those_who_require_all() -> None:
    gathered = _gathered("a", failed=_DOWN)
    gathered.require_any()
    with pytest.raises(Unavailable) as caught:
        gathered.require_all()
    assert caught.value.reason == "SHARDS_MISSING"
    assert caught.value.retryable
    assert "b (SHARD_UNAVAILABLE), c (DEADLINE_EXCEEDED)" in caught.value.message


def test_no_answer_at_all_is_never_an_empty_one() -> None:
    with pytest.raises(Unavailable):
        _gathered(failed=_DOWN).require_any()
