"""The tables of docs/performance.md: each section's is rewritten by a run that measured it."""

from pathlib import Path

from loadtest.bench.results import Results


def rewrite(page: Path, section: str, results: Results, measured: str) -> None:
    """Puts a section's tables between its marks; `measured` says when and on what."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    table = results.section_text(section)
    page.write_text(f"{before}{begin}\n{table}\n\n{measured}\n{end}{after}", encoding="utf-8")
