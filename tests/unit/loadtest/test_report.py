"""Reports: ghz's shape and words, the histogram's sums, limits that do not hold."""

import re
from dataclasses import replace

import pytest

from loadtest import report
from loadtest.engine import Outcome
from loadtest.profile import parse
from loadtest.tally import Said, Tally, merged


def _outcome(**limits: object) -> Outcome:
    tally = Tally(seconds=2.0)
    for milliseconds in range(1, 101):
        tally.of("search").succeeded(milliseconds / 1000)
    tally.of("store").succeeded(0.5)
    tally.of("store").failed("UNAVAILABLE", "SHARD_UNAVAILABLE")
    profile = parse(
        {
            "name": "test",
            "operations": {"search": 4, "store": 1},
            "concurrency": 4,
            "read": "session",
            "limits": limits,
        },
        "test",
    )
    return Outcome(profile, "stub", "localhost:50051", tally, "normal", 1_700_000_000.0)


def test_text_has_what_ghz_prints() -> None:
    text = report.text(_outcome())
    for part in (
        "Count:\t102",
        "Total:\t2.00 s",
        "Requests/sec:\t51.00",
        "Slowest:\t500",
        "Fastest:\t1.00 ms",
        "Response time histogram:",
        "Latency distribution:",
        "Status code distribution:\n  [OK]\t101 responses\n  [UNAVAILABLE]\t1 responses",
        "Error distribution:\n  [1]\tUNAVAILABLE SHARD_UNAVAILABLE",
    ):
        assert part in text
    assert re.search(r"50 % in 51\.\d+ ms", text)


def test_json_has_ghzs_fields() -> None:
    document = report.document(_outcome())
    assert {"name", "endReason", "options", "date", "count", "total", "average", "fastest", "slowest", "rps"} <= (
        document.keys()
    )
    assert document["count"] == 102
    assert document["rps"] == 51
    assert document["total"] == 2_000_000_000
    assert document["statusCodeDistribution"] == {"OK": 101, "UNAVAILABLE": 1}
    assert document["operations"]["store"]["count"] == 2
    by_percentage = {one["percentage"]: one["latency"] for one in document["latencyDistribution"]}
    assert by_percentage[99] == pytest.approx(100_000_000, rel=0.01)
    assert sum(one["count"] for one in document["histogram"]) == 101
    assert sum(one["frequency"] for one in document["histogram"]) == pytest.approx(1)


def test_limits_that_do_not_hold_are_told() -> None:
    outcome = _outcome(errors=0, p99_ms={"search": 50, "store": 600})
    assert report.exceeded(outcome) == ["1 of 102 calls failed", "p99 of search: 99.0 ms, at most 50 ms"]
    assert "Limit exceeded: p99 of search" in report.text(outcome)
    assert report.exceeded(_outcome(errors=0.1, p99_ms={"search": 150})) == []


def test_caches_and_levels_are_told_and_limited() -> None:
    outcome = _outcome(cache_hit_ratio=0.8, levels="normal")
    for number in range(100):
        outcome.tally.of("get").succeeded(0.001, Said("NORMAL", number < 79))
    outcome.tally.of("store").succeeded(0.001, Said("REDUCED"))
    assert report.exceeded(outcome) == [
        "cache hit ratio of reads: 0.790, at least 0.8",
        "answers under a degradation level: 1 at REDUCED",
    ]
    text, document = report.text(outcome), report.document(outcome)
    assert "Cache hit ratio of reads: 0.790 (79 of 100)" in text
    assert "Answers under a degradation level: 1 at REDUCED" in text
    assert (document["cacheHitRatio"], document["degradationLevels"]) == (0.79, {"REDUCED": 1})
    assert document["operations"]["get"]["cacheHitRatio"] == 0.79
    assert document["operations"]["store"]["cacheHitRatio"] is None
    outcome.tally.of("get").succeeded(0.001, Said("NORMAL", True))
    outcome.tally.of("store").levels.clear()
    assert report.exceeded(replace(outcome, profile=_outcome(cache_hit_ratio=0.79, levels="normal").profile)) == []


def test_no_read_at_all_is_no_cache_hit() -> None:
    outcome = _outcome(cache_hit_ratio=0.8)
    assert report.exceeded(outcome) == ["cache hit ratio of reads: 0.000, at least 0.8"]
    assert "Cache hit ratio" not in report.text(outcome).split("Limit exceeded")[0]


def test_an_empty_run_is_a_report_too() -> None:
    empty = Outcome(_outcome().profile, "sdk", "", Tally(), "cancel", 0.0)
    assert "Count:\t0" in report.text(empty)
    assert "It was ended early." in report.text(empty)
    assert report.document(empty)["rps"] == 0


def test_processes_add_up_through_json() -> None:
    one = _outcome().tally
    one.of("search").succeeded(0.1, Said("REDUCED", True))
    both = merged([one, Tally.from_json(one.to_json())])
    assert both.seconds == 2
    assert both.of("search").count == 202
    assert (both.all().reads, both.all().cached, both.all().levels) == (2, 2, {"REDUCED": 2})
    assert both.all().codes["UNAVAILABLE"] == 2
