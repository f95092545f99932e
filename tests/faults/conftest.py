"""Figures of the scenarios: printed by each, and with MEMSHARD_FIGURES=1, as `make faults` sets it, kept in a page."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import figures
from tests.support.figures import Figures

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

_measured = pytest.StashKey[list[Figures]]()

Record = Callable[[str, str, str], None]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Call it with scenario, what must hold, and what was measured. Only the full scenarios' figures are kept."""
    kept: list[Figures] = []

    def take(scenario: str, must_hold: str, measured: str) -> None:
        one = Figures(scenario, must_hold, measured)
        print(one)
        kept.append(one)

    yield take
    if request.node.get_closest_marker("slow"):
        request.config.stash.setdefault(_measured, []).extend(kept)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was measured becomes the page's, also where it fell short of what must hold: the page says what is."""
    measured = session.config.stash.get(_measured, [])
    if measured and os.environ.get("MEMSHARD_FIGURES") == "1":
        figures.rewrite(PAGE, measured)
