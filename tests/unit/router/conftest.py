"""What tests of a router's parts have in common."""

from collections.abc import Iterator

import pytest

from tests.support.spans import Spans, recording


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Whatever is traced."""
    with recording() as recorded:
        yield recorded
