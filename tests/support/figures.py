"""The table of figures in docs/reliability.md: one row for each scenario, rewritten by those who measured it."""

from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_HEAD = ["| scenario | must hold | measured |", "|---|---|---|"]


@dataclass(frozen=True)
class Figures:
    """What a scenario must keep to, and what was measured."""

    scenario: str
    must_hold: str
    measured: str

    def __str__(self) -> str:
        return f"{self.scenario}: {self.measured}"


def rewrite(file: Path, measured: list[Figures]) -> None:
    """Puts figures into the table of a page. Those of other scenarios stay what they were."""
    text = file.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    rows = {_scenario(line): line for line in table.splitlines() if line.startswith("| ") and line not in _HEAD}
    rows |= {one.scenario: f"| {one.scenario} | {one.must_hold} | {one.measured} |" for one in measured}
    lines = [BEGIN, *_HEAD, *rows.values(), END]
    file.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def _scenario(row: str) -> str:
    return row.split("|")[1].strip()
