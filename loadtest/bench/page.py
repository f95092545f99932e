"""The tables of docs/performance.md: each section's is rewritten by a run that measured it."""

from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.results import Results


@dataclass(frozen=True, slots=True)
class Run:
    """What a table has to say of the run that made it."""

    when: str
    where: str
    """Machine and versions."""
    command: str
    rounds: int
    seconds: float
    """Of each round of calls."""
    bulk_rows: int
    """Of each round of the bulk load."""


def measured(run: Run, section: str, results: Results) -> str:
    """The last line below a section's tables."""
    length = f"{run.bulk_rows:,} rows" if section == "bulk" else f"{run.seconds:g} s"
    rounds = f"{run.rounds} {'round' if run.rounds == 1 else 'rounds'} of {length}"
    left_out = ", ".join(f"{name} ({why})" for name, why in results.left_out.items())
    who = f"without {left_out}" if left_out else "nobody left out"
    return f"{run.when}, {run.where}. `{run.command}`: {rounds}, {who}."


def rewrite(page: Path, section: str, results: Results, measured: str) -> None:
    """Puts a section's tables between its marks; `measured` says how they were made."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    table = results.section_text(section)
    page.write_text(f"{before}{begin}\n{table}\n\n{measured}\n{end}{after}", encoding="utf-8")
