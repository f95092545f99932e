"""The benchmark's sums: medians, ratios within a round, faults that make a run no measurement."""

from pathlib import Path

import pytest

from loadtest.bench.__main__ import exit_status, options_of, parse
from loadtest.bench.page import Run, measured, rewrite
from loadtest.bench.results import SECTIONS, Results, Round, of_workers
from loadtest.bench.workload import K, Workload, memory_id, user_name
from loadtest.histogram import Histogram


def _round(rate: float, **more: object) -> Round:
    return Round(rate, Histogram({1000: 10}), **more)  # type: ignore[arg-type]


def _results() -> Results:
    results = Results(left_out={"Chroma server": "chromadb is not installed"})
    for ours, theirs in ((100, 100), (130, 100), (300, 200)):
        results.add("search", "memshard", _round(ours, recalls=[1.0, 0.5]))
        results.add("search", "asyncpg, vector", _round(theirs))
    return results


def test_ratios_are_taken_within_their_round() -> None:
    results = _results()
    assert results.rate("search", "memshard") == 130
    assert results.ratio("search", "asyncpg, vector") == pytest.approx(1.3)
    assert results.recall("search", "memshard") == 0.75
    assert results.ratio("search", "Chroma server") is None


def test_tables_have_everybody_and_why_somebody_is_missing() -> None:
    tables = _results().tables()
    assert "| memshard | 130 (100 to 300) | 1.30 | 0.750 |" in tables
    assert "Chroma server: left out, chromadb is not installed." in tables
    assert "| search one user ÷ asyncpg, vector | 1.30 | ≥ 1.3 | 2 |" in tables


def test_a_missed_target_is_told() -> None:
    results = Results()
    results.add("store", "memshard", _round(29))
    results.add("store", "asyncpg, vector", _round(100))
    assert results.missed() == ["store ÷ asyncpg, vector: 0.29, must be 0.3"]
    assert "**missed** 0.29" in results.tables()


def test_errors_and_levels_make_it_no_measurement() -> None:
    results = _results()
    assert results.faults() == []
    results.add("get", "memshard", _round(10, levels={"DEGRADATION_LEVEL_REDUCED": 3}))
    results.add("get", "asyncpg, vector", _round(10, errors={"TimeoutError": 1}))
    assert results.faults() == [
        "get, memshard: answers under a degradation level: 3 DEGRADATION_LEVEL_REDUCED",
        "get, asyncpg, vector: 1 TimeoutError",
    ]


def test_workers_add_up() -> None:
    one = {
        "count": 100,
        "seconds": 2.0,
        "cpu_s": 1.0,
        "histogram": {"1000": 100},
        "recalls": [1.0],
        "errors": {"X": 1},
        "levels": {},
    }
    both = of_workers([one, one])
    assert (both.rate, both.generator_cpu, both.histogram.count, both.errors) == (100, 1, 200, {"X": 2})


def test_truth_is_what_is_nearest() -> None:
    workload = Workload(users=2, memories=40, dimensions=8)
    query = workload.rows(1)[7]
    truth = workload.truth(1, query)
    assert len(truth) == K
    assert memory_id(1, 7) in truth
    assert user_name(1) == "user-00001"


def test_questions_never_repeat() -> None:
    workload = Workload(users=5, memories=5, dimensions=4)
    seen = set()
    for worker in range(3):
        for number in range(3):
            questions = workload.questions(worker, number)
            seen |= {questions.search()[1].tobytes() for _ in range(10)}
    assert len(seen) == 90


def test_a_page_keeps_all_but_the_section(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("above\n<!-- search: begin -->\nold\n<!-- search: end -->\nbelow\n")
    rewrite(page, "search", _results(), "2026-11-20, a machine.")
    text = page.read_text()
    assert text.startswith("above\n<!-- search: begin -->\n### search one user")
    assert text.endswith("2026-11-20, a machine.\n<!-- search: end -->\nbelow\n")
    assert "old" not in text


def test_a_table_tells_how_it_was_made() -> None:
    run = Run(
        when="2026-11-21",
        where="2 cores; PostgreSQL 18.4, vector 0.8.5",
        command="python -m loadtest.bench --rounds 3",
        rounds=3,
        seconds=2.5,
        bulk_rows=8000,
    )
    begin = "2026-11-21, 2 cores; PostgreSQL 18.4, vector 0.8.5. `python -m loadtest.bench --rounds 3`: "
    left_out = "without Chroma server (chromadb is not installed)."
    assert measured(run, "search", _results()) == f"{begin}3 rounds of 2.5 s, {left_out}"
    assert measured(run, "bulk", _results()) == f"{begin}3 rounds of 8,000 rows, {left_out}"
    assert measured(run, "bulk", Results()).endswith(", nobody left out.")


def test_a_must_that_is_missed_fails_the_command_unless_it_is_quick() -> None:
    assert exit_status([], [], quick=False) == 0
    assert exit_status([], ["store ÷ asyncpg, vector: 0.29, must be 0.3"], quick=False) == 1
    assert exit_status([], ["store ÷ asyncpg, vector: 0.29, must be 0.3"], quick=True) == 0
    assert exit_status(["get: 1 TimeoutError"], [], quick=True) == 1


def test_several_sections_can_be_named_at_once() -> None:
    assert options_of(parse(["--only", "bulk,get", "--only", "get"])).sections == ("get", "bulk")
    assert options_of(parse([])).sections == SECTIONS
    with pytest.raises(SystemExit):
        parse(["--only", "get,nothing"])
